"""The records of a run, taken at the end of each step as whoever writes them does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import TrainerCallback

from online_dpo import OnlineDPOTrainer


class TakesRecords(TrainerCallback):
    """Takes the records of every step of a trainer; ``rows`` are as strict JSON gives them back."""

    def __init__(self, made: OnlineDPOTrainer, most: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.records: list[Any] = []
        self._ledger, self._most = made.ledger, most
        made.ledger.on = True
        made.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = self._ledger.take(state.global_step, self._most)
        self.records += taken
        self.rows += [json.loads(json.dumps(record.as_json(), allow_nan=False)) for record in taken]

    def of(self, step: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["step"] == step]


def trained_pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pair with its group's row."""
    return [(row, pair) for row in rows for pair in row.get("pairs", [])]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    return json.loads(json.dumps(rows), object_hook=lambda found: {k: v for k, v in found.items() if k != "seconds"})


OF_ONE_PROCESS = {"rank", "index", "seconds", "cached", "tokens", "cost"}
"""What differs by which process records a group, and what another one asked before."""


def figures(value: Any, name: str = "") -> dict[str, Any]:
    """The entries of a row, by their paths."""
    if isinstance(value, dict):
        parts = [(f"{name}/{key}", one) for key, one in value.items() if key not in OF_ONE_PROCESS]
    elif isinstance(value, list):
        parts = [(f"{name}/{place}", one) for place, one in enumerate(value)]
    else:
        return {name: value}
    return {path: entry for part, one in parts for path, entry in figures(one, part).items()}


def assert_together_those_of_one(ranks: list[list[dict[str, Any]]], expected: list[dict[str, Any]]) -> None:
    """The rows of several ranks are those of one process: each once, with the same facts, and figures to 1e-4."""
    found, wanted = (
        {(row["step"], row["prompt_row"], row["round"]): figures(row) for row in rows}
        for rows in ([row for rows in ranks for row in rows], expected)
    )
    assert len(found) == sum(map(len, ranks)) == len(expected) == len(wanted)
    assert [{row["rank"] for row in rows} for rows in ranks] == [{rank} for rank in range(len(ranks))]
    for key, row in wanted.items():
        numbers = {path: value for path, value in row.items() if isinstance(value, float)}
        assert {path: found[key][path] for path in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        assert {**found[key], **numbers} == row
    assert any(path.endswith("log_ratios/0") for row in wanted.values() for path in row)
