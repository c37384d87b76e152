"""SDPA for rows that share prompts, one piece of a row at a time: what the mask hides is hardly computed.

PyTorch's attention on a CPU computes the whole of a dense mask. Here a prompt attends to itself, and each completion to
its prompt and itself, as in a row of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from online_dpo.packing.prefix_tree import PADDING
from online_dpo.types import TokenRows

NAME = "online_dpo_segments"
SHORTEST = 384
"""Tokens of a row. Below, one call for the whole row is faster than several."""


class Segment(NamedTuple):
    """A completion, or a prompt: the places where its prompt begins and ends, and where it begins and ends itself.

    What is read of it begins at ``read``: from there on, its tokens look at its prompt and at itself.
    """

    prompt_start: int
    prompt_end: int
    start: int
    end: int
    read: int


def register() -> None:
    """Make the attention known to transformers as ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def segments(tokens: TokenRows) -> list[list[Segment]] | None:
    """The segments of all rows; ``None`` where rows are too short to gain.

    >>> segments(rows of [prompt of 300 | completion of 60 | completion of 40 | padding of 10])
    [[(0, 0, 0, 300, 0), (0, 300, 300, 360, 300), (0, 300, 360, 400, 360)]]
    """
    if tokens.ids_RT.shape[1] < SHORTEST:
        return None
    return [_segments(*row) for row in zip(tokens.tree_RT.tolist(), tokens.branch_RT.tolist(), strict=True)]


def only_read(rows: list[list[Segment]], read_X: torch.Tensor, length: int) -> list[list[Segment]]:
    """The segments as far as they are read, those that are read nowhere left out.

    Args:
        read_X: ascending places of the flattened rows, (X,).
        length: tokens of a row.
    """
    places = read_X.tolist()
    found = []
    for r, row in enumerate(rows):
        kept = []
        for segment in row:
            first = bisect_left(places, r * length + segment.start)
            behind = bisect_left(places, r * length + segment.end)
            if first < behind:
                read, last = places[first] - r * length, places[behind - 1] - r * length
                kept.append(segment._replace(end=last + 1, read=read))
        found.append(kept)
    return found


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: list[list[Segment]] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers: in segments where they are given, SDPA elsewhere (sampling, padded rows)."""
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if segments is None or dropout or special:  # SDPA says what it cannot do
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = [_row(query[r], key[r], value[r], row, scaling) for r, row in enumerate(segments)]
    return torch.stack(rows).transpose(1, 2).contiguous(), None


def _row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: list[Segment], scale: float | None
) -> torch.Tensor:
    """Attention of one row, all (heads, tokens, head size); zeros where nothing is read, as on padding."""
    parts, place = [], 0
    for prompt_start, prompt_end, start, end, read in row:
        before = prompt_end - prompt_start
        if before:
            keys = torch.cat([key[:, prompt_start:prompt_end], key[:, start:end]], dim=1)
            values = torch.cat([value[:, prompt_start:prompt_end], value[:, start:end]], dim=1)
        else:
            keys, values = key[:, start:end], value[:, start:end]
        plain = not before and read == start
        seen = None
        if not plain:
            seen = torch.ones(end - read, before + end - start, dtype=torch.bool, device=query.device)
            seen = seen.tril(before + read - start)
        parts.append(query.new_zeros(query.shape[0], read - place, value.shape[-1]))
        parts.append(
            F.scaled_dot_product_attention(
                query[None, :, read:end],
                keys[None],
                values[None],
                attn_mask=seen,
                is_causal=plain,
                scale=scale,
            )[0]
        )
        place = end
    parts.append(query.new_zeros(query.shape[0], query.shape[1] - place, value.shape[-1]))
    return torch.cat(parts, dim=1)


def _segments(tree_T: list[int], branch_T: list[int]) -> list[Segment]:
    found: list[Segment] = []
    place, prompt = 0, (0, 0)
    for (tree, branch), tokens in groupby(zip(tree_T, branch_T, strict=True)):
        start, place = place, place + len(list(tokens))
        if tree == PADDING:
            continue
        if branch == 0:
            prompt = (start, place)
            found.append(Segment(start, start, start, place, start))
        else:
            found.append(Segment(*prompt, start, place, start))
    return found
