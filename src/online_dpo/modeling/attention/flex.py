"""FlexAttention for rows that share prompts: blocks of the attention mask that are all masked are not computed.

So many trees can be packed into one row, without padding, at little cost. Training needs a GPU; on a CPU only the
forward pass works, uncompiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from online_dpo.types import TokenRows

NAME = "online_dpo_flex"


def register() -> None:
    """Registers the attention function with transformers, as ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: FlexAttention if the mask is a `BlockMask`, else SDPA (sampling,
    padded rows).

    Raises:
        NotImplementedError: with a block mask, dropout in attention or attention sinks.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or kwargs.get("s_aux") is not None:
        raise NotImplementedError("`flex_attention` supports neither dropout in attention nor attention sinks")
    output = _flex(query.device.type)(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output.transpose(1, 2).contiguous(), None


def block_mask(tokens: TokenRows, window: int | None, chunk: int | None) -> BlockMask:
    """The attention mask of `masks.visible_mask`, as the block mask of FlexAttention."""
    tree_RT, branch_RT, position_RT = tokens.tree_RT, tokens.branch_RT, tokens.positions_RT

    def mask_mod(r: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        visible = (j <= i) & (tree_RT[r, i] == tree_RT[r, j])
        visible &= (branch_RT[r, j] == 0) | (branch_RT[r, i] == branch_RT[r, j])
        if window is not None:
            visible &= position_RT[r, i] - position_RT[r, j] < window
        if chunk is not None:
            visible &= position_RT[r, i] // chunk == position_RT[r, j] // chunk
        return visible

    rows, length = tree_RT.shape
    device = tree_RT.device
    return create_block_mask(mask_mod, rows, None, length, length, device=device, _compile=device.type == "cuda")


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """FlexAttention, on a GPU compiled once for all lengths: uncompiled it would compute masked blocks too."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
