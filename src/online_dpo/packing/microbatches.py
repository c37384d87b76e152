"""Pairs to micro-batches and passes of equal token count. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from online_dpo.packing.pack import by_group, pack_pairs
from online_dpo.packing.prefix_tree import split_balanced
from online_dpo.types import PackedRows, Pair


def token_count(pairs: Sequence[Pair]) -> int:
    """Tokens of the pairs when each prompt, and each completion of a group, is stored once."""
    count = 0
    for members in by_group(pairs):
        group = members[0].group
        used = {k for pair in members for k in (pair.chosen, pair.rejected)}
        count += len(group.prompt.token_ids) + sum(len(group.completions[k].token_ids) for k in used)
    return count


def split_pairs(pairs: Sequence[Pair], parts: int) -> list[list[Pair]]:
    """The pairs in ``parts`` lists with about equally many tokens; some may be empty. Groups stay whole."""
    return split_evenly(by_group(pairs), parts)


def passes_needed(pairs: Sequence[Pair], max_tokens: int) -> int:
    """The fewest lists that `split_pairs` makes of at most ``max_tokens`` each, or of one group that has more alone."""
    groups = by_group(pairs)
    parts = max(1, math.ceil(token_count(pairs) / max_tokens))
    while parts < len(groups):
        split = split_evenly(groups, parts)
        if all(len(by_group(part)) <= 1 or token_count(part) <= max_tokens for part in split):
            return parts
        parts += 1
    return max(1, len(groups))


def split_evenly(units: Sequence[list[Pair]], parts: int) -> list[list[Pair]]:
    lists = split_balanced([token_count(unit) for unit in units], parts)
    return [[pair for i in indices for pair in units[i]] for indices in lists]


def halve(rows: PackedRows, capacity: int = 0) -> list[PackedRows]:
    """The same pairs in two passes of about equally many tokens. Needs two pairs or more; only those of a single group
    are parted.
    """
    assert len(rows.pairs) >= 2
    groups = by_group(rows.pairs)
    halves = split_evenly(groups if len(groups) > 1 else [[pair] for pair in rows.pairs], 2)
    return [pack_pairs(half, rows.tokens.shares_prompts, capacity) for half in halves]
