"""The fields that say how the policy is trained, and those of transformers: which values they take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from online_dpo.config.hf_ranges import RANGES, Range, out_of_range
from support.configuration import check_range, made, refused


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside"),
    [
        ("max_tokens_per_pass", "at least 1", [None, 1], [0]),
        ("max_skipped_steps", "at least 1", [1], [0]),
        ("max_idle_steps", "at least 1, or None", [1, None], [0]),
        ("skipped_step_lr_factor", "in (0, 1]", [1e-3, 0.5, 1], [0, 1.1]),
        ("skipped_step_lr_recovery", "at least 1", [1, 500], [0]),
        ("learning_rate", "above 0, and finite", [1e-9, 1.0], [0, -1.0, math.inf, math.nan]),
        ("logging_steps", "0 or more", [1e-3, 0.5, 3], [-1, math.inf]),
        ("max_grad_norm", "0 (off) or more", [0, 1.0, math.inf], [-1, math.nan]),
        ("per_device_train_batch_size", "at least 1", [1], [0]),
        ("per_device_eval_batch_size", "at least 1", [1], [0]),
        ("gradient_accumulation_steps", "at least 1", [1], [0]),
        ("dataloader_num_workers", "0 or more", [0, 1], [-1]),
        ("max_steps", "1 or more, or -1 to go by epochs", [1, -1], [0, -2]),
        ("seed", "from 0 to 2**32 - 1", [0, 2**32 - 1], [-1, 2**32]),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any]) -> None:
    check_range(name, wanted, inside, outside)


def test_epochs_are_needed_where_steps_are_not_given() -> None:
    check_range("num_train_epochs", "above 0", inside=[0.5, 1], outside=[0, -1])
    assert made(num_train_epochs=0, max_steps=3).max_steps == 3


def test_every_field_of_the_table_is_checked() -> None:
    outside = {name: -math.inf for name in RANGES}
    assert [name for name, _ in out_of_range(outside)] == list(RANGES)
    assert list(out_of_range({"seed": None, "learning_rate": "1e-6", "max_steps": -1})) == []


def test_the_ends_of_a_range() -> None:
    half_open, above = Range(at_least=0, below=1, wanted=""), Range(above=0, also=(-1,), wanted="")
    assert [half_open.holds(value) for value in (-0.1, 0, 0.9, 1, math.nan)] == [False, True, True, False, False]
    assert [above.holds(value) for value in (-2, -1, 0, 1e-9, math.inf)] == [False, True, False, True, True]


def test_passes_are_as_large_as_the_device_likes() -> None:
    assert (made().tokens_per_pass, made(max_tokens_per_pass=7).tokens_per_pass) == (1024, 7)


def test_bf16_is_off_on_a_cpu_unless_it_is_asked_for() -> None:
    assert (made().bf16, made(bf16=True).bf16, made(bf16=False).bf16) == (False, True, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` must be False"),
        ({"label_smoothing_factor": 0.1}, "Preferences are smoothed by `label_smoothing`."),
        ({"flex_attention": True}, "`flex_attention=True` needs a GPU"),
        ({"fsdp": "full_shard"}, "Start them with `torchrun"),
        ({"torch_compile_backend": "inductr"}, "Did you mean `inductor`?"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    refused(message, **fields)
