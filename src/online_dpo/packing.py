"""Pairs and groups to padded rows that a model can read. Pure: lists in, tensors out.

Shapes: ``R`` rows, ``T`` tokens, ``C`` completion tokens, ``N`` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from online_dpo.types import Completion, Group, PackedRows, Pair, Prompt


def pack_pairs(pairs: Sequence[Pair], pad_token_id: int) -> PackedRows:
    """Two rows a pair: the chosen completions of all pairs, then the rejected ones."""
    assert pairs
    count = len(pairs)
    sequences = [(pair.group.prompt, pair.chosen_completion) for pair in pairs]
    sequences += [(pair.group.prompt, pair.rejected_completion) for pair in pairs]
    scores = [pair.chosen_score for pair in pairs] + [pair.rejected_score for pair in pairs]
    return _pack(sequences, scores, list(range(count)), list(range(count, 2 * count)), [1.0] * count, pad_token_id)


def pack_groups(groups: Sequence[Group], pairs: Sequence[Pair], pad_token_id: int) -> PackedRows:
    """One row for every completion of every group, in order, with the pairs as indices into them (for evaluation)."""
    sequences = [(group.prompt, completion) for group in groups for completion in group.completions]
    first_row: dict[int, int] = {}
    row = 0
    for group in groups:
        first_row[id(group)] = row
        row += len(group.completions)
    chosen = [first_row[id(pair.group)] + pair.chosen for pair in pairs]
    rejected = [first_row[id(pair.group)] + pair.rejected for pair in pairs]
    return _pack(sequences, [None] * len(sequences), chosen, rejected, [1.0] * len(pairs), pad_token_id)


def stand_in(token_id: int) -> PackedRows:
    """Rows of one pair with weight 0, so that a rank without pairs takes part in the same collective operations."""
    completion = Completion((token_id,), (0.0,), "stop", 0, "")
    sequences = [(Prompt("", (token_id,), 0), completion)] * 2
    return _pack(sequences, [None, None], [0], [1], [0.0], token_id)


def as_inputs(rows: PackedRows) -> dict[str, Any]:
    """What `transformers.Trainer` passes around as a micro-batch; it counts tokens in ``input_ids``."""
    return {"rows": rows, "input_ids": rows.ids_RT, "attention_mask": rows.attention_mask_RT}


def split_evenly(pairs: Sequence[Pair], parts: int) -> list[list[Pair]]:
    """The pairs in order, cut into ``parts`` lists whose lengths differ by at most one; some may be empty."""
    cuts = [len(pairs) * part // parts for part in range(parts + 1)]
    return [list(pairs[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]


def halve(rows: PackedRows) -> tuple[PackedRows, PackedRows]:
    """The same pairs in two batches of rows. Needs two pairs or more."""
    count = len(rows.weight_N)
    assert count >= 2
    return _select_pairs(rows, range(count // 2)), _select_pairs(rows, range(count // 2, count))


def _select_pairs(rows: PackedRows, pairs: range) -> PackedRows:
    chosen, rejected = rows.chosen_N[pairs.start : pairs.stop], rows.rejected_N[pairs.start : pairs.stop]
    keep = torch.cat([chosen, rejected])
    count = len(pairs)
    return PackedRows(
        ids_RT=rows.ids_RT[keep],
        attention_mask_RT=rows.attention_mask_RT[keep],
        positions_RT=rows.positions_RT[keep],
        completion_mask_RC=rows.completion_mask_RC[keep],
        chosen_N=torch.arange(count, device=keep.device),
        rejected_N=torch.arange(count, 2 * count, device=keep.device),
        weight_N=rows.weight_N[pairs.start : pairs.stop],
        score_R=rows.score_R[keep],
    )


def _pack(
    sequences: Sequence[tuple[Prompt, Completion]],
    scores: Sequence[float | None],
    chosen: list[int],
    rejected: list[int],
    weights: list[float],
    pad_token_id: int,
) -> PackedRows:
    completion_length = max(len(completion.token_ids) for _, completion in sequences)
    # All completions end at the right edge, so a shorter one leaves positions inside the last C that hold prompt or
    # padding; the completion mask says which are its own.
    length = max(len(prompt.token_ids) + len(completion.token_ids) for prompt, completion in sequences)
    length = max(length, completion_length + 1)  # the first completion token is predicted from the position before it
    ids, mask, positions, completion_mask = [], [], [], []
    for prompt, completion in sequences:
        tokens = [*prompt.token_ids, *completion.token_ids]
        padding = length - len(tokens)
        ids.append([pad_token_id] * padding + tokens)
        mask.append([0] * padding + [1] * len(tokens))
        positions.append([0] * padding + list(range(len(tokens))))
        outside = completion_length - len(completion.token_ids)
        completion_mask.append([False] * outside + [True] * len(completion.token_ids))
    return PackedRows(
        ids_RT=torch.tensor(ids),
        attention_mask_RT=torch.tensor(mask),
        positions_RT=torch.tensor(positions),
        completion_mask_RC=torch.tensor(completion_mask),
        chosen_N=torch.tensor(chosen, dtype=torch.long),
        rejected_N=torch.tensor(rejected, dtype=torch.long),
        weight_N=torch.tensor(weights),
        score_R=torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64),
    )
