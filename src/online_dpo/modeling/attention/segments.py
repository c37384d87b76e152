"""SDPA for rows that share prompts, one segment (prompt or completion) at a time, so that little masked is computed.

On a CPU, PyTorch's SDPA also computes the scores that a dense mask hides. Here one call computes a prompt's attention
to itself, and one call for each completion its attention to its prompt and itself, as in a row of its own.
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
"""Tokens of a row. For shorter rows, one call for the whole row is faster than several."""


class Segment(NamedTuple):
    """A completion or a prompt of one row: indices in the row where its prompt starts and ends, and where it does
    itself.

    A prompt has an empty prompt of its own. Attention is computed for the queries from index ``read`` on.
    """

    prompt_start: int
    prompt_end: int
    start: int
    end: int
    read: int


def register() -> None:
    """Registers the attention function with transformers, as ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def segments(tokens: TokenRows) -> list[list[Segment]] | None:
    """The segments of all rows; ``None`` if rows are too short for segments to be faster.

    >>> segments(rows of [prompt of 300 | completion of 60 | completion of 40 | padding of 10])
    [[(0, 0, 0, 300, 0), (0, 300, 300, 360, 300), (0, 300, 360, 400, 360)]]
    """
    if tokens.ids_RT.shape[1] < SHORTEST:
        return None
    return [_segments(*row) for row in zip(tokens.tree_RT.tolist(), tokens.branch_RT.tolist(), strict=True)]


def trim_to_read(rows: list[list[Segment]], read_X: torch.Tensor, length: int) -> list[list[Segment]]:
    """The segments cut to the queries that are read; segments without any are left out.

    Args:
        read_X: ascending indices of the flattened rows, (X,).
        length: tokens of a row.
    """
    indices = read_X.tolist()
    trimmed = []
    for r, row in enumerate(rows):
        kept = []
        for segment in row:
            first = bisect_left(indices, r * length + segment.start)
            end = bisect_left(indices, r * length + segment.end)
            if first < end:
                read, last = indices[first] - r * length, indices[end - 1] - r * length
                kept.append(segment._replace(end=last + 1, read=read))
        trimmed.append(kept)
    return trimmed


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
    """The attention function that transformers calls: by segments if given, else SDPA (sampling, padded rows)."""
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if segments is None or dropout or special:  # SDPA raises an error for what it does not support
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
    """Attention of one row, from and to (heads, tokens, head size); zeros for queries that are not read and for
    padding.
    """
    parts, done = [], 0
    for prompt_start, prompt_end, start, end, read in row:
        prompt_length = prompt_end - prompt_start
        if prompt_length:
            keys = torch.cat([key[:, prompt_start:prompt_end], key[:, start:end]], dim=1)
            values = torch.cat([value[:, prompt_start:prompt_end], value[:, start:end]], dim=1)
        else:
            keys, values = key[:, start:end], value[:, start:end]
        plain = not prompt_length and read == start  # plain causal attention, which has a faster kernel than a mask
        mask = None
        if not plain:
            mask = torch.ones(end - read, prompt_length + end - start, dtype=torch.bool, device=query.device)
            mask = mask.tril(prompt_length + read - start)
        parts.append(query.new_zeros(query.shape[0], read - done, value.shape[-1]))
        parts.append(
            F.scaled_dot_product_attention(
                query[None, :, read:end],
                keys[None],
                values[None],
                attn_mask=mask,
                is_causal=plain,
                scale=scale,
            )[0]
        )
        done = end
    parts.append(query.new_zeros(query.shape[0], query.shape[1] - done, value.shape[-1]))
    return torch.cat(parts, dim=1)


def _segments(tree_T: list[int], branch_T: list[int]) -> list[Segment]:
    """The segments of one row, from the tree and branch numbers of its tokens."""
    row: list[Segment] = []
    end, prompt = 0, (0, 0)
    for (tree, branch), tokens in groupby(zip(tree_T, branch_T, strict=True)):
        start, end = end, end + len(list(tokens))
        if tree == PADDING:
            continue
        if branch == 0:
            prompt = (start, end)
            row.append(Segment(start, start, start, end, start))
        else:
            row.append(Segment(*prompt, start, end, start))
    return row
