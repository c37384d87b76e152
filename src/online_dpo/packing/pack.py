"""Packing pairs and groups into rows that a model can read. Pure.

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

BRANCHES = 4  # the largest number of completions of one tree: attention grows with the square of its length

_DUMMY = Completion((0,), (0.0,), "stop", 0, "")
STAND_IN = Group(Prompt("", (0,), 0), (_DUMMY, _DUMMY))


def pack_pairs(pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """Packs the completions of the pairs; if ``shared``, with one copy of each prompt (see `lay_out`).

    A completion that is in several pairs of its group is packed once.
    """
    assert pairs
    groups, scores, index = [], [], {}
    for members in by_group(pairs):
        group = members[0].group
        score_of: dict[int, float | None] = {}
        for pair in members:
            score_of[pair.chosen] = pair.chosen_score
            score_of[pair.rejected] = pair.rejected_score
        index |= {(id(group), k): len(scores) + i for i, k in enumerate(score_of)}
        groups.append(Group(group.prompt, tuple(group.completions[k] for k in score_of)))
        scores += score_of.values()
    chosen = [index[id(pair.group), pair.chosen] for pair in pairs]
    rejected = [index[id(pair.group), pair.rejected] for pair in pairs]
    return _pack(groups, scores, chosen, rejected, pairs, shared, capacity)


def pack_groups(groups: Sequence[Group], pairs: Sequence[Pair], shared: bool, capacity: int = 0) -> PackedRows:
    """Packs all completions of the groups, in order, with the pairs as indices into them (for evaluation)."""
    first: dict[int, int] = {}
    count = 0
    for group in groups:
        first[id(group)] = count
        count += len(group.completions)
    chosen = [first[id(pair.group)] + pair.chosen for pair in pairs]
    rejected = [first[id(pair.group)] + pair.rejected for pair in pairs]
    return _pack(groups, [None] * count, chosen, rejected, pairs, shared, capacity)


def stand_in(shared: bool) -> PackedRows:
    """Dummy rows: one pair with weight 0, so that a rank without pairs runs the same collective operations."""
    return replace(_pack([STAND_IN], [None, None], [0], [1], [Pair(STAND_IN, 0, 1, weight=0.0)], shared, 0), pairs=())


def as_inputs(passes: Sequence[PackedRows]) -> dict[str, Any]:
    """The micro-batch that `transformers.Trainer` gets: a dict with one pass or more, each with its own backward pass.

    ``input_ids`` has all tokens without padding, because Trainer counts tokens in it.
    """
    ids = torch.cat([rows.tokens.ids_RT[rows.tokens.tree_RT >= 0] for rows in passes])[None]
    return {"passes": list(passes), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _trees(group: Group) -> list[Tree]:
    """The trees of a group, each with at most `BRANCHES` completions."""
    branches = [completion.token_ids for completion in group.completions]
    starts = range(0, len(branches), BRANCHES)
    return [Tree(group.prompt.token_ids, tuple(branches[start : start + BRANCHES])) for start in starts]


def _pack(
    groups: Sequence[Group],
    scores: Sequence[float | None],
    chosen: list[int],
    rejected: list[int],
    pairs: Sequence[Pair],
    shared: bool,
    capacity: int,
) -> PackedRows:
    """Packs groups. ``scores`` has one entry for each completion; ``chosen`` and ``rejected`` are indices of
    completions, counted over all groups, one for each pair.
    """
    trees = [tree for group in groups for tree in _trees(group)]
    tokens, spans = lay_out(trees, shared, capacity)
    source, target, lengths = [], [], []
    for tree, tree_spans in zip(trees, spans, strict=True):
        for branch, span in zip(tree.branches, tree_spans, strict=True):
            # The first token of a completion is predicted by the last one of its prompt.
            source += [span.before, *range(span.start, span.start + len(branch) - 1)]
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
    """The pairs of each group, groups in the order of their first pair."""
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(id(pair.group), []).append(pair)
    return list(groups.values())
