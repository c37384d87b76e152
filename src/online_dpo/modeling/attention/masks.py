"""Attention masks and position ids for packed rows, and which models can use them.

In a row that shares prompts, a token attends to the tokens before it that are in its own completion or in the prompt of
its own tree, and to no others.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from online_dpo.modeling.attention import flex, sdpa, segments
from online_dpo.modeling.introspection import accepts_argument, unwrapped, without_router_logits
from online_dpo.packing.prefix_tree import PADDING
from online_dpo.types import TokenRows

LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOWS_BY_INDEX = ("attention_layers", "window_size")
"""Config fields of GPT-Neo, whose local attention adds a window over indices in the row (not positions) to any mask."""
IMPLEMENTATIONS = {"sdpa", "eager", flex.NAME, sdpa.NAME, segments.NAME}


def why_not_shared(model: nn.Module) -> str | None:
    """Why this model cannot read rows that share prompts, as far as its class and config tell; ``None`` if it can."""
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return "it is not a model of transformers"
    config = base.config.get_text_config()
    if any(hasattr(config, name) for name in WINDOWS_BY_INDEX):
        return "its local attention depends on indices in the row, not on position ids"
    if not accepts_argument(model, "position_ids"):
        return "it takes no `position_ids`"
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention implementation {config._attn_implementation!r} takes no mask of (rows, tokens, tokens)"
    others = set(layer_kinds(config)) - LAYERS
    if others:
        return f"its layers are not all attention ({', '.join(sorted(others))})"
    return None


def attention_inputs(model: nn.Module, tokens: TokenRows) -> dict[str, Any]:
    """The keyword arguments for a forward pass over packed rows: ``attention_mask``, ``position_ids`` and the like.

    The mask of rows that share prompts has shape (R, 1, T, T). A model with several kinds of layers (full,
    sliding-window, chunked attention) gets one mask for each kind. The mask of other rows has shape (R, T) and is 0 for
    padding.
    """
    inputs: dict[str, Any] = without_router_logits(model)
    if accepts_argument(model, "position_ids"):
        inputs["position_ids"] = tokens.positions_RT
    if not tokens.shares_prompts:
        return inputs | {"attention_mask": (tokens.tree_RT != PADDING).long()}
    config = unwrapped(model).config.get_text_config()
    if config._attn_implementation == segments.NAME and set(layer_kinds(config)) == {"full_attention"}:
        inputs["segments"] = segments.segments(tokens)
    masks: dict[str, Any] = {kind: _mask(model, tokens, kind) for kind in sorted(set(layer_kinds(config)))}
    return inputs | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def visible_mask(tokens: TokenRows, window: int | None = None, chunk: int | None = None) -> torch.Tensor:
    """The attention mask of rows that share prompts, (R, T, T) bool: whether a query (second dimension) attends to a
    key (third dimension).

    ``window`` and ``chunk`` are measured in position ids, so each completion has the mask that it has in a row of its
    own. Padding attends to padding: a query without any key would give nan.
    """
    length = tokens.ids_RT.shape[1]
    tree_RT, branch_RT, position_RT = tokens.tree_RT, tokens.branch_RT, tokens.positions_RT
    visible_RTT = tree_RT[:, :, None] == tree_RT[:, None, :]
    visible_RTT &= (branch_RT[:, None, :] == 0) | (branch_RT[:, :, None] == branch_RT[:, None, :])
    visible_RTT &= torch.ones(length, length, dtype=torch.bool, device=tree_RT.device).tril()
    if window is not None:
        visible_RTT &= position_RT[:, :, None] - position_RT[:, None, :] < window
    if chunk is not None:
        visible_RTT &= position_RT[:, :, None] // chunk == position_RT[:, None, :] // chunk
    return visible_RTT


def window_of(config: Any, kind: str) -> int | None:
    """The attention window of layers of this kind, in positions; ``None`` if they attend to all earlier tokens."""
    return config.sliding_window if kind == "sliding_attention" else None


def _mask(model: nn.Module, tokens: TokenRows, kind: str) -> Any:
    """The attention mask of layers of one kind, in the form that the model's attention implementation takes."""
    config = unwrapped(model).config.get_text_config()
    window = window_of(config, kind)
    chunk = config.attention_chunk_size if kind == "chunked_attention" else None
    if config._attn_implementation == flex.NAME:
        return flex.block_mask(tokens, window, chunk)
    visible_R1TT = visible_mask(tokens, window, chunk)[:, None]
    if config._attn_implementation == "eager":  # it adds the mask to the attention scores
        dtype = unwrapped(model).dtype  # the first parameter may be of a quantised layer
        zeros = torch.zeros(visible_R1TT.shape, dtype=dtype, device=visible_R1TT.device)
        return zeros.masked_fill_(~visible_R1TT, torch.finfo(dtype).min)
    return visible_R1TT


def layer_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer; if the config has no list of kinds, one entry for all layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
