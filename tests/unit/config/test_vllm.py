"""The fields of vLLM: which values they take, and which of them a mode reads."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from online_dpo.config.vllm import READ_BY, VLLMFields
from support.configuration import check_range, ignored, made, refused


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside", "mode"),
    [
        ("vllm_tensor_parallel_size", "at least 1", [1, 4], [0], "colocate"),
        ("vllm_gpu_memory_utilization", "above 0 and at most 1", [None, 0.1, 1.0], [0.0, 1.1], "colocate"),
        ("vllm_server_port", "a port: 1 to 65535", [1, 65535], [0, 65536], "server"),
        ("vllm_group_port", "a port: 0 to 65535", [0, 65535], [-1, 65536], "server"),
        ("vllm_server_timeout", "above 0", [0.1], [0, -1.0], "server"),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any], mode: str) -> None:
    check_range(name, wanted, inside, outside, use_vllm=True, vllm_mode=mode)


def test_choices() -> None:
    for name, choices in (
        ("vllm_mode", ("colocate", "server")),
        ("vllm_weight_transfer", ("auto", "broadcast", "file", "http")),
    ):
        for choice in choices:
            assert getattr(made(use_vllm=True, **{name: choice}), name) == choice
        refused(f"`{name}` must be one of {', '.join(choices)}; it is 'x'.", use_vllm=True, **{name: "x"})


def test_addresses() -> None:
    assert made().vllm_server_urls == ["http://localhost:8000"]
    assert made(vllm_server_host="a", vllm_server_port=1).vllm_server_urls == ["http://a:1"]
    assert made(vllm_server_base_url="http://a:1/, http://b:2").vllm_server_urls == ["http://a:1", "http://b:2"]
    wanted = "`vllm_server_base_url` must be an address, or several separated by commas; it is ' , '."
    refused(wanted, use_vllm=True, vllm_mode="server", vllm_server_base_url=" , ")


def test_structured_outputs_are_not_here() -> None:
    refused("`vllm_structured_outputs_regex` is not in this version", use_vllm=True, vllm_structured_outputs_regex="a+")


def test_fields_that_are_not_read() -> None:
    changed = {"vllm_server_port": 9, "vllm_enable_sleep_mode": True}
    ignored("Ignored without `use_vllm`: vllm_enable_sleep_mode, vllm_server_port.", **changed)
    ignored("Ignored with `vllm_mode='colocate'`: vllm_server_port.", use_vllm=True, **changed)
    ignored("Ignored with `vllm_mode='server'`: vllm_enable_sleep_mode.", use_vllm=True, vllm_mode="server", **changed)


def test_every_field_is_of_one_mode_or_of_both() -> None:
    names = [field.name for field in fields(VLLMFields)]
    of_one = [name for names_of_mode in READ_BY.values() for name in names_of_mode]
    assert len(set(of_one)) == len(of_one) and set(of_one) < set(names)
    assert set(names) - set(of_one) == {"use_vllm", "vllm_mode", "vllm_structured_outputs_regex"}
