"""Collation: rows of a prepared dataset to a batch, and a batch to prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from online_dpo.data.convert import without_nulls
from online_dpo.data.prompts import PREPARED_COLUMNS
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import callable_name, foreign
from online_dpo.types import Prompt


def collate_prompts(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate rows into a dict with one list for each column. A row without a column has ``None`` there.

    >>> collate_prompts([{"prompt": "a", "label": 1}, {"prompt": "b"}])
    {'prompt': ['a', 'b'], 'label': [1, None]}
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    return {column: [row.get(column) for row in rows] for column in columns}


@dataclass(frozen=True)
class UsersCollator:
    """Wraps a user's data collator, so that its errors name it and the rows."""

    collate: Callable[[list[dict[str, Any]]], dict[str, list[Any]]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Collate rows into a batch.

        Raises:
            ForeignCodeError: the user's collator raised an error.
        """
        numbers = ", ".join(str(row.get("prompt_row")) for row in rows)
        with foreign(f"Data collator `{callable_name(self.collate)}`", f"(rows {numbers})", raises=ForeignCodeError):
            return self.collate(rows)


def prompts_from_batch(batch: dict[str, list[Any]]) -> list[Prompt]:
    """Convert a batch of prepared rows to prompts, in order.

    ``columns`` of a prompt are those that ``prepare_prompts`` did not add. Keys of messages whose value is ``None``,
    which datasets fill in, are removed.

    Raises:
        ValueError: a collator dropped a column that is needed here, or the columns are not lists of equal length.
    """
    missing = [column for column in PREPARED_COLUMNS if column not in batch]
    if missing:
        raise ValueError(
            f"The batch lacks {', '.join(missing)}. A data_collator has to keep the columns "
            f"{', '.join(PREPARED_COLUMNS)} as lists; leave `data_collator` out to use the trainer's own."
        )
    wrong = {column: type(values).__name__ for column, values in batch.items() if not isinstance(values, (list, tuple))}
    if wrong:
        raise ValueError(
            f"A data_collator has to return a list for each column, with one entry a row; these are no lists: {wrong}."
        )
    lengths = {column: len(values) for column, values in batch.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A data_collator has to return lists of the same length; it returned {lengths}.")
    others = [column for column in batch if column not in PREPARED_COLUMNS]
    return [
        Prompt(
            content=without_nulls(batch["prompt"][i]),
            token_ids=tuple(batch["prompt_ids"][i]),
            row=batch["prompt_row"][i],
            columns={column: batch[column][i] for column in others},
            invalid=batch["prompt_invalid"][i],
            cut=batch["prompt_cut"][i],
        )
        for i in range(lengths["prompt"])
    ]
