"""Prompts: from a file or a hub dataset to rows that are checked, converted and tokenised once.

>>> dataset = load_prompts("prompts.jsonl")
>>> dataset, left_out = prepare_prompts(dataset, tokenizer, args)
>>> prompts = prompts_from_batch(collate_prompts([dataset[0], dataset[1]]))
"""

from __future__ import annotations

from online_dpo.data.collate import UsersCollator, collate_prompts, prompts_from_batch
from online_dpo.data.convert import transcript_to_messages
from online_dpo.data.cut import CUT, SayCutPrompts
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import PREPARED_COLUMNS, prepare_prompts
from online_dpo.data.stream import EndlessStream

__all__ = [
    "CUT",
    "PREPARED_COLUMNS",
    "EndlessStream",
    "SayCutPrompts",
    "UsersCollator",
    "collate_prompts",
    "load_prompts",
    "prepare_prompts",
    "prompts_from_batch",
    "transcript_to_messages",
]
