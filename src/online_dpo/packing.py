"""Pairs and groups to rows that a model can read, and pairs to micro-batches of equal token count. Pure.

Shapes: ``S`` completions, ``M`` tokens of all these completions, ``N`` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from online_dpo.layout import Tree, lay_out, split_balanced
from online_dpo.types import Completion, Group, PackedRows, Pair, Prompt

BRANCHES = 4  # completions of one tree, at most: its attention grows with the square of its length

_NOTHING = Completion((0,), (0.0,), "stop", 0, "")
STAND_IN = Group(Prompt("", (0,), 0), (_NOTHING, _NOTHING))


def pack_pairs(pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """Chosen and rejected of each pair, from one copy of their prompt if ``shared`` (see `layout.lay_out`)."""
    assert pairs
    groups = [Group(p.group.prompt, (p.chosen_completion, p.rejected_completion)) for p in pairs]
    scores = [score for p in pairs for score in (p.chosen_score, p.rejected_score)]
    count = len(pairs)
    chosen, rejected = list(range(0, 2 * count, 2)), list(range(1, 2 * count, 2))
    return _pack(groups, scores, chosen, rejected, [1.0] * count, pairs, shared, capacity)


def pack_groups(groups: Sequence[Group], pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """Every completion of every group, in order, with the pairs as indices into them (for evaluation)."""
    first: dict[int, int] = {}
    count = 0
    for group in groups:
        first[id(group)] = count
        count += len(group.completions)
    chosen = [first[id(pair.group)] + pair.chosen for pair in pairs]
    rejected = [first[id(pair.group)] + pair.rejected for pair in pairs]
    weights = [1.0] * len(pairs)
    return _pack(groups, [None] * count, chosen, rejected, weights, pairs, shared, capacity)


def stand_in(shared: bool) -> PackedRows:
    """Rows of one pair with weight 0, so that a rank without pairs takes part in the same collective operations."""
    return _pack([STAND_IN], [None, None], [0], [1], [0.0], (), shared, 0)


def as_inputs(passes: Sequence[PackedRows]) -> dict[str, Any]:
    """What `transformers.Trainer` passes around as a micro-batch of one forward and backward pass or more; it counts
    tokens in ``input_ids``.
    """
    ids = torch.cat([rows.tokens.ids_RT[rows.tokens.tree_RT >= 0] for rows in passes])[None]
    return {"passes": list(passes), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tree_size(pair: Pair) -> int:
    """Tokens of a pair when its prompt is stored once."""
    return sum(len(c.token_ids) for c in (pair.group.prompt, pair.chosen_completion, pair.rejected_completion))


def split_pairs(pairs: Sequence[Pair], parts: int) -> list[list[Pair]]:
    """The pairs in ``parts`` lists with about equally many tokens; some may be empty."""
    return [[pairs[i] for i in indices] for indices in split_balanced([tree_size(pair) for pair in pairs], parts)]


def passes_needed(pairs: Sequence[Pair], max_tokens: int) -> int:
    """The fewest lists that `split_pairs` makes of at most ``max_tokens`` each, or of one pair that has more alone."""
    parts = max(1, math.ceil(sum(map(tree_size, pairs)) / max_tokens))
    while parts < len(pairs):
        if all(len(part) <= 1 or sum(map(tree_size, part)) <= max_tokens for part in split_pairs(pairs, parts)):
            return parts
        parts += 1
    return max(1, len(pairs))


def halve(rows: PackedRows, capacity: int = 0) -> list[PackedRows]:
    """The same pairs in two passes of about equally many tokens. Needs two pairs or more."""
    assert len(rows.pairs) >= 2
    return [pack_pairs(part, rows.tokens.shares_prompts, capacity) for part in split_pairs(rows.pairs, 2)]


def _trees(group: Group) -> list[Tree]:
    branches = [completion.token_ids for completion in group.completions]
    cuts = range(0, len(branches), BRANCHES)
    return [Tree(group.prompt.token_ids, tuple(branches[start : start + BRANCHES])) for start in cuts]


def _pack(
    groups: Sequence[Group],
    scores: Sequence[float | None],
    chosen: list[int],
    rejected: list[int],
    weights: list[float],
    pairs: Sequence[Pair],
    shared: bool,
    capacity: int,
) -> PackedRows:
    trees = [tree for group in groups for tree in _trees(group)]
    tokens, places = lay_out(trees, shared, capacity)
    source, target, lengths = [], [], []
    for tree, tree_places in zip(trees, places, strict=True):
        for branch, place in zip(tree.branches, tree_places, strict=True):
            source += [place.before, *range(place.start, place.start + len(branch) - 1)]
            target += branch
            lengths.append(len(branch))
    return PackedRows(
        tokens=tokens,
        source_M=torch.tensor(source),
        target_M=torch.tensor(target),
        sampled_logps_M=torch.tensor([x for group in groups for c in group.completions for x in c.logprobs]),
        length_S=torch.tensor(lengths),
        chosen_N=torch.tensor(chosen, dtype=torch.long),
        rejected_N=torch.tensor(rejected, dtype=torch.long),
        weight_N=torch.tensor(weights),
        score_S=torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64),
        pairs=tuple(pairs),
    )
