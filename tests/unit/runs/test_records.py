"""Records as strict JSON: which keys a row has, what is exact, what is rounded, and what JSON has nothing for."""

from __future__ import annotations

import json
from datetime import datetime
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from online_dpo.runs.plain_json import number, plain, plain_or_named, rounded
from online_dpo.runs.records import (
    ComparisonRecord,
    CompletionRecord,
    GroupRecord,
    OrderRecord,
    PairRecord,
)

BARE = CompletionRecord("Red.", 2, "stop", "policy", 11)


def strict(row: dict[str, Any]) -> dict[str, Any]:
    """The row after a way through strict JSON."""
    return json.loads(json.dumps(row, allow_nan=False))


def test_a_bare_group_has_no_empty_keys() -> None:
    row = GroupRecord(12, 0, 3, 0, "Name a colour.", 17, 4, (BARE,)).as_json()

    assert strict(row) == {
        "step": 12,
        "rank": 0,
        "index": 3,
        "round": 0,
        "prompt": "Name a colour.",
        "prompt_row": 17,
        "prompt_length": 4,
        "prompt_cut": False,
        "completions": [{"text": "Red.", "length": 2, "finish": "stop", "author": "policy", "version": 11}],
    }


def test_a_full_group_has_every_key() -> None:
    completion = CompletionRecord(
        "Red.",
        2,
        "stop",
        "policy",
        11,
        rewards={"format": 0.1 + 0.2, "model": None},
        weighted={"format": 0.15},
        normalized={"format": 1.0},
        penalties={"length": 0.2},
        score=None,
        ranking=-1.5,
        sampled_logp=-4.123456789,
        tokens=["Red", "."],
        log_ratios=[0.0123457, -0.2],
        logp=-4.1,
        ref_logp=-4.3,
    )
    order = OrderRecord((1, 0), None, "Hm.", 0.8123456789, 512, 0.001, "no verdict", cached=True)
    group = GroupRecord(
        12,
        1,
        3,
        1,
        [{"role": "user", "content": "Hi"}],
        17,
        4,
        (completion, BARE),
        prompt_cut=True,
        columns={"label": "red"},
        pairs=(PairRecord(1, 0, 0.9, 2.0, 0.5, 0.69, 0.03),),
        reason="resampled",
        resampled_for="tie",
        left_out={"margin": 2},
        comparisons=(ComparisonRecord(0, 1, None, (order,)),),
        notes={"answer": ["5", "7"]},
        skipped=True,
    )
    row = strict(group.as_json())

    assert row["completions"][0] == {
        "text": "Red.",
        "length": 2,
        "finish": "stop",
        "author": "policy",
        "version": 11,
        "rewards": {"format": 0.30000000000000004, "model": None},
        "weighted": {"format": 0.15},
        "normalized": {"format": 1.0},
        "penalties": {"length": 0.2},
        "score": None,
        "ranking": -1.5,
        "sampled_logp": -4.12346,
        "tokens": ["Red", "."],
        "log_ratios": [0.0123457, -0.2],
        "logp": -4.1,
        "ref_logp": -4.3,
    }
    assert row["pairs"] == [
        {"chosen": 1, "rejected": 0, "probability": 0.9, "margin": 2.0, "weight": 0.5, "loss": 0.69, "implied": 0.03}
    ]
    assert row["comparisons"] == [
        {
            "first": 0,
            "second": 1,
            "probability": None,
            "orders": [
                {
                    "shown": [1, 0],
                    "probability": None,
                    "words": "Hm.",
                    "seconds": 0.812346,
                    "tokens": 512,
                    "cost": 0.001,
                    "failure": "no verdict",
                    "cached": True,
                }
            ],
        }
    ]
    assert {key: row[key] for key in ("reason", "resampled_for", "left_out", "notes", "skipped", "columns")} == {
        "reason": "resampled",
        "resampled_for": "tie",
        "left_out": {"margin": 2},
        "notes": {"answer": ["5", "7"]},
        "skipped": True,
        "columns": {"label": "red"},
    }


def test_numbers_that_are_not_finite_are_null() -> None:
    completion = CompletionRecord(
        "a", 1, "stop", "policy", 0, rewards={"f": float("nan")}, score=float("inf"), log_ratios=[float("nan"), 1.0]
    )
    row = strict(GroupRecord(1, 0, 0, 0, "p", 0, 1, (completion,), columns={"x": float("inf")}).as_json())

    assert row["columns"] == {"x": None}
    assert row["completions"][0]["rewards"] == {"f": None}
    assert row["completions"][0]["score"] is None
    assert row["completions"][0]["log_ratios"] == [None, 1.0]
    assert rounded(float("-inf")) is None


def test_a_column_that_json_has_nothing_for_is_named() -> None:
    columns = {"image": b"\x89PNG", "when": datetime(2026, 1, 1), "deep": {"a": [b"x"]}, "label": "red", "empty": None}
    row = strict(GroupRecord(1, 0, 0, 0, "p", 0, 1, (BARE,), columns=columns).as_json())

    assert row["columns"] == {"label": "red", "empty": None}
    assert row["columns_left_out"] == ["image", "when", "deep"]


def test_a_part_of_a_message_that_json_has_nothing_for_is_named_in_its_place() -> None:
    prompt = [{"role": "user", "content": [{"type": "image", "image": b"\x89PNG"}, {"type": "text", "text": "Hi"}]}]
    row = strict(GroupRecord(1, 0, 0, 0, prompt, 0, 1, (BARE,)).as_json())

    assert row["prompt"][0]["content"] == [
        {"type": "image", "image": {"left_out": "bytes"}},
        {"type": "text", "text": "Hi"},
    ]


def test_scalars_of_numpy_and_torch_are_plain() -> None:
    values = [np.bool_(True), np.int64(3), np.float32(0.5), torch.tensor(2), np.str_("a"), (1, "b")]

    assert plain(values) == [True, 3, 0.5, 2, "a", [1, "b"]]
    assert [type(value) for value in plain(values)] == [bool, int, float, int, str, list]
    assert plain({1: "a"}) == {"1": "a"}
    assert plain_or_named(np.zeros((2, 2))) == {"left_out": "ndarray"}
    assert plain_or_named(memoryview(b"x")) == {"left_out": "memoryview"}
    with pytest.raises(TypeError, match="no key of type tuple"):
        plain({(1, 2): "a"})


def test_values_that_no_file_could_hold_end_nothing() -> None:
    endless: list[Any] = ["a"]
    endless.append(endless)
    columns = {"endless": endless, "long": 10**5000, "fraction": Fraction(10) ** 400, "label": "red"}
    notes = {"endless": [endless], "long": [10**5000]}
    row = strict(GroupRecord(1, 0, 0, 0, "p", 0, 1, (BARE,), columns=columns, notes=notes).as_json())

    assert row["columns"] == {"long": None, "fraction": None, "label": "red"}
    assert row["columns_left_out"] == ["endless"]
    assert row["notes"]["long"] == [None]
    assert json.dumps(row["notes"]["endless"]).count("left_out") == 1


def test_a_number_that_was_read_is_finite_or_none():
    assert [number(value) for value in (2, 0.5, 1e308)] == [2.0, 0.5, 1e308]
    strange = (True, None, "2", float("nan"), float("-inf"), 10**400, [1.0])
    assert [number(value) for value in strange] == [None] * len(strange)
