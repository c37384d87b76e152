"""SDPA for rows that share prompts, one piece of a row at a time: what the mask hides is hardly computed.

PyTorch's attention on a CPU computes the whole of a dense mask. Here a prompt attends to itself, and each completion to
its prompt and itself, as in a row of its own.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from online_dpo.layout import PADDING
from online_dpo.types import TokenRows

NAME = "online_dpo_segments"
SHORTEST = 384
"""Tokens of a row. Below, one call for the whole row is faster than several."""

Segment = tuple[int, int, int, int]
"""A completion, or a prompt: the places where its prompt begins and ends, and where it begins and ends itself."""


def register() -> None:
    """Make the attention known to transformers as ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def segments(tokens: TokenRows) -> list[list[Segment]] | None:
    """The segments of each row, in order; ``None`` where rows are too short to gain.

    >>> segments(rows of [prompt of 300 | completion of 60 | completion of 40 | padding of 10])
    [[(0, 0, 0, 300), (0, 300, 300, 360), (0, 300, 360, 400)]]
    """
    if tokens.ids_RT.shape[1] < SHORTEST:
        return None
    return [_segments(*row) for row in zip(tokens.tree_RT.tolist(), tokens.branch_RT.tolist(), strict=True)]


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
    if segments is None or dropout or kwargs.get("position_bias") is not None:
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
    """Attention of one row, all (heads, tokens, head size); zeros on padding."""
    read = []
    for prompt_start, prompt_end, start, end in row:
        before = prompt_end - prompt_start
        if before:
            keys = torch.cat([key[:, prompt_start:prompt_end], key[:, start:end]], dim=1)
            values = torch.cat([value[:, prompt_start:prompt_end], value[:, start:end]], dim=1)
        else:
            keys, values = key[:, start:end], value[:, start:end]
        length = end - start
        mask = torch.ones(length, before + length, dtype=torch.bool, device=query.device).tril(before)
        read.append(
            F.scaled_dot_product_attention(
                query[None, :, start:end],
                keys[None],
                values[None],
                attn_mask=mask if before else None,
                is_causal=not before,
                scale=scale,
            )[0]
        )
    padding = query.shape[1] - row[-1][3]
    return F.pad(torch.cat(read, dim=1), (0, 0, 0, padding))


def _segments(tree_T: list[int], branch_T: list[int]) -> list[Segment]:
    found: list[Segment] = []
    place, prompt = 0, (0, 0)
    for (tree, branch), tokens in groupby(zip(tree_T, branch_T, strict=True)):
        start, place = place, place + len(list(tokens))
        if tree == PADDING:
            continue
        if branch == 0:
            prompt = (start, place)
            found.append((start, start, start, place))
        else:
            found.append((*prompt, start, place))
    return found
