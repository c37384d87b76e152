"""Pairs and groups to rows that a model can read, and pairs to micro-batches of equal token count. Pure.

Shapes: ``S`` completions, ``M`` tokens of all these completions, ``N`` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from online_dpo.packing.prefix_tree import Tree, lay_out
from online_dpo.types import Completion, Group, PackedRows, Pair, Prompt

BRANCHES = 4  # completions of one tree, at most: its attention grows with the square of its length

_NOTHING = Completion((0,), (0.0,), "stop", 0, "")
STAND_IN = Group(Prompt("", (0,), 0), (_NOTHING, _NOTHING))


def pack_pairs(pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """The completions of the pairs, from one copy of their prompt if ``shared`` (see `layout.lay_out`).

    A completion that stands in several pairs of its group is there once.
    """
    assert pairs
    groups, scores, place = [], [], {}
    for members in by_group(pairs):
        group = members[0].group
        found: dict[int, float | None] = {}
        for pair in members:
            found[pair.chosen] = pair.chosen_score
            found[pair.rejected] = pair.rejected_score
        place |= {(id(group), k): len(scores) + i for i, k in enumerate(found)}
        groups.append(Group(group.prompt, tuple(group.completions[k] for k in found)))
        scores += found.values()
    chosen = [place[id(pair.group), pair.chosen] for pair in pairs]
    rejected = [place[id(pair.group), pair.rejected] for pair in pairs]
    return _pack(groups, scores, chosen, rejected, pairs, shared, capacity)


def pack_groups(groups: Sequence[Group], pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """Every completion of every group, in order, with the pairs as indices into them (for evaluation)."""
    first: dict[int, int] = {}
    count = 0
    for group in groups:
        first[id(group)] = count
        count += len(group.completions)
    chosen = [first[id(pair.group)] + pair.chosen for pair in pairs]
    rejected = [first[id(pair.group)] + pair.rejected for pair in pairs]
    return _pack(groups, [None] * count, chosen, rejected, pairs, shared, capacity)


def stand_in(shared: bool) -> PackedRows:
    """Rows of one pair with weight 0, so that a rank without pairs takes part in the same collective operations."""
    return replace(_pack([STAND_IN], [None, None], [0], [1], [Pair(STAND_IN, 0, 1, weight=0.0)], shared, 0), pairs=())


def as_inputs(passes: Sequence[PackedRows]) -> dict[str, Any]:
    """What `transformers.Trainer` passes around as a micro-batch of one forward and backward pass or more; it counts
    tokens in ``input_ids``.
    """
    ids = torch.cat([rows.tokens.ids_RT[rows.tokens.tree_RT >= 0] for rows in passes])[None]
    return {"passes": list(passes), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _trees(group: Group) -> list[Tree]:
    branches = [completion.token_ids for completion in group.completions]
    cuts = range(0, len(branches), BRANCHES)
    return [Tree(group.prompt.token_ids, tuple(branches[start : start + BRANCHES])) for start in cuts]


def _pack(
    groups: Sequence[Group],
    scores: Sequence[float | None],
    chosen: list[int],
    rejected: list[int],
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
        read_X=torch.tensor(sorted(set(source))),
        target_M=torch.tensor(target),
        sampled_logps_M=torch.tensor([x for group in groups for c in group.completions for x in c.logprobs]),
        length_S=torch.tensor(lengths),
        chosen_N=torch.tensor(chosen, dtype=torch.long),
        rejected_N=torch.tensor(rejected, dtype=torch.long),
        probability_N=torch.tensor([pair.probability for pair in pairs]),
        weight_N=torch.tensor([pair.weight for pair in pairs]),
        score_S=torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64),
        by_policy_S=torch.tensor([c.by_policy for group in groups for c in group.completions]),
        pairs=tuple(pairs),
    )


def by_group(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each group, in the order in which groups come first."""
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(id(pair.group), []).append(pair)
    return list(groups.values())
