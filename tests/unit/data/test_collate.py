"""Rows to a batch, a batch to prompts."""

from __future__ import annotations

import re

import pytest
from accelerate.utils import send_to_device

from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.types import Prompt


def row(number, **columns):
    return {
        "prompt": f"p{number}",
        "prompt_ids": [number, 7],
        "prompt_row": number,
        "prompt_invalid": None,
        "prompt_cut": False,
        **columns,
    }


def test_collate_keeps_every_column_of_every_row():
    batch = collate_prompts([{"prompt": "a", "label": 1}, {"prompt": "b", "topic": {"x": None}}])
    assert batch == {"prompt": ["a", "b"], "label": [1, None], "topic": [None, {"x": None}]}


def test_prompts_hold_ids_row_and_the_other_columns():
    prompts = prompts_from_batch(collate_prompts([row(4, label="red"), row(2, label=None)]))
    assert prompts == [
        Prompt(content="p4", token_ids=(4, 7), row=4, columns={"label": "red"}),
        Prompt(content="p2", token_ids=(2, 7), row=2, columns={"label": None}),
    ]


def test_messages_lose_keys_that_the_dataset_filled_with_none_but_columns_do_not():
    message = {"role": "user", "content": "a", "name": None}
    [prompt] = prompts_from_batch(collate_prompts([row(0, prompt=[message], extra=[message])]))
    assert prompt.content == [{"role": "user", "content": "a"}]
    assert prompt.is_conversational
    assert prompt.columns == {"extra": [message]}


def test_invalid_rows_keep_their_reason():
    [prompt] = prompts_from_batch(
        collate_prompts([row(3, prompt="", prompt_ids=[], prompt_invalid="the text is empty")])
    )
    assert prompt == Prompt(content="", token_ids=(), row=3, invalid="the text is empty")


def test_batches_survive_the_move_to_a_device():
    batch = collate_prompts([row(4, label=1.5), row(2, prompt=[{"role": "user", "content": "a"}], label=None)])
    moved = send_to_device(batch, "cpu")
    assert moved is not batch
    assert prompts_from_batch(moved) == prompts_from_batch(batch)


@pytest.mark.parametrize("column", ["prompt", "prompt_ids", "prompt_row", "prompt_invalid", "prompt_cut"])
def test_dropped_column_is_named(column):
    batch = collate_prompts([row(0)])
    del batch[column]
    with pytest.raises(ValueError, match=f"The batch lacks {column}\\. A data_collator has to keep"):
        prompts_from_batch(batch)


def test_unequal_lengths_are_named():
    batch = collate_prompts([row(0), row(1)])
    batch["label"] = [1]
    message = re.escape("lists of the same length; it returned {'prompt': 2,") + ".*'label': 1"
    with pytest.raises(ValueError, match=message):
        prompts_from_batch(batch)


def test_something_else_than_a_list_is_named():
    batch = {**collate_prompts([row(0)]), "label": 3}
    with pytest.raises(ValueError, match=re.escape("these are no lists: {'label': 'int'}")):
        prompts_from_batch(batch)
