"""Splitting pairs into micro-batches and passes with about equal token counts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from online_dpo.packing.pack import by_group, pack_pairs
from online_dpo.packing.prefix_tree import PADDING, split_balanced
from online_dpo.types import PackedRows, Pair


def token_count(pairs: Sequence[Pair]) -> int:
    """The number of tokens of the pairs if each prompt, and each completion of a group, is stored once."""
    count = 0
    for members in by_group(pairs):
        group = members[0].group
        used = {k for pair in members for k in (pair.chosen, pair.rejected)}
        count += len(group.prompt.token_ids) + sum(len(group.completions[k].token_ids) for k in used)
    return count


def split_pairs(pairs: Sequence[Pair], parts: int) -> list[list[Pair]]:
    """Splits pairs into ``parts`` lists with about equal token counts. Groups are not split; lists may be empty."""
    return split_evenly(by_group(pairs), parts)


def passes_needed(pairs: Sequence[Pair], max_tokens: int) -> int:
    """The smallest ``parts`` for which each list of `split_pairs` has at most ``max_tokens`` tokens, or one group."""
    groups = by_group(pairs)
    parts = max(1, math.ceil(token_count(pairs) / max_tokens))
    while parts < len(groups):
        split = split_evenly(groups, parts)
        if all(len(by_group(part)) <= 1 or token_count(part) <= max_tokens for part in split):
            return parts
        parts += 1
    return max(1, len(groups))


def split_evenly(units: Sequence[list[Pair]], parts: int) -> list[list[Pair]]:
    """Distributes lists of pairs, each kept whole, over ``parts`` lists with about equal token counts."""
    lists = split_balanced([token_count(unit) for unit in units], parts)
    return [[pair for i in indices for pair in units[i]] for indices in lists]


def halve(rows: PackedRows, capacity: int = 0) -> list[PackedRows]:
    """Splits a pass into two with about equal token counts. It must have two pairs or more. A group is split only if it
    is the only one.
    """
    assert len(rows.pairs) >= 2
    groups = by_group(rows.pairs)
    halves = split_evenly(groups if len(groups) > 1 else [[pair] for pair in rows.pairs], 2)
    return [pack_pairs(half, rows.tokens.shares_prompts, capacity) for half in halves]


def tokens_read(passes: Sequence[PackedRows]) -> dict[str, torch.Tensor]:
    """The tokens that a model reads in these passes, as ``input_ids`` and ``attention_mask`` in one row each: a prompt
    that completions share counts once.
    """
    tokens = [rows.tokens for rows in passes]
    return {
        "input_ids": torch.cat([part.ids_RT.flatten() for part in tokens]),
        "attention_mask": torch.cat([part.tree_RT.flatten() != PADDING for part in tokens]),
    }
