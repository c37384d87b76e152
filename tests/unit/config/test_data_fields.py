"""The fields that say how prompts are read: which values they take."""

from __future__ import annotations

from support.configuration import check_range, made, refused


def test_ranges() -> None:
    check_range("dataset_num_proc", "0 or more", inside=[None, 0, 1, 4], outside=[-1])


def test_choices() -> None:
    for choice in ("error", "filter"):
        assert made(invalid_prompts=choice).invalid_prompts == choice
    refused(
        "`invalid_prompts` must be one of error, filter; it is 'filtr'. Did you mean `filter`?", invalid_prompts="filtr"
    )
    refused("`invalid_prompts` must be one of error, filter; it is None.", invalid_prompts=None)
