"""The records of a run, taken at the end of each step as whoever writes them does."""

from __future__ import annotations

import json
from typing import Any

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
