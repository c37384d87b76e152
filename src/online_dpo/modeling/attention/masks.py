"""What a model must be told so that tokens in rows see what they may see.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from online_dpo.modeling.attention import flex, segments
from online_dpo.modeling.introspection import accepts_argument, unwrapped, without_router_logits
from online_dpo.packing.prefix_tree import PADDING
from online_dpo.types import TokenRows

LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOWS_BY_INDEX = ("attention_layers", "window_size")  # GPT-Neo's local attention, which no mask of ours can express
IMPLEMENTATIONS = {"sdpa", "eager", flex.NAME, segments.NAME}


def why_not_shared(model: nn.Module) -> str | None:
    """What keeps this model from reading rows that share prompts, as far as its config tells; ``None`` if nothing."""
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return "it is no model of transformers"
    config = base.config.get_text_config()
    if any(hasattr(config, name) for name in WINDOWS_BY_INDEX):
        return "it cuts attention by places in the row"
    if not accepts_argument(model, "position_ids"):
        return "it takes no `position_ids`"
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention implementation {config._attn_implementation!r} takes no mask of (rows, tokens, tokens)"
    others = set(layer_kinds(config)) - LAYERS
    if others:
        return f"its layers are not all attention ({', '.join(sorted(others))})"
    return None


def attention_inputs(model: nn.Module, tokens: TokenRows) -> dict[str, Any]:
    """``attention_mask`` and ``position_ids`` for a forward pass over the rows.

    Rows that share prompts get a mask of shape (R, 1, T, T), or one for each kind of layer where a model mixes full,
    sliding-window and chunked attention.
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
    """Which token (second index) each token (first index) sees, (R, T, T) bool.

    The distance that ``window`` and ``chunk`` cut at is that of positions, so it is the same as if each completion
    stood alone behind its prompt. Padding sees padding, so that no token sees nothing.
    """
    length = tokens.ids_RT.shape[1]
    tree_RT, branch_RT, position_RT = tokens.tree_RT, tokens.branch_RT, tokens.positions_RT
    seen_RTT = tree_RT[:, :, None] == tree_RT[:, None, :]
    seen_RTT &= (branch_RT[:, None, :] == 0) | (branch_RT[:, :, None] == branch_RT[:, None, :])
    seen_RTT &= torch.ones(length, length, dtype=torch.bool, device=tree_RT.device).tril()
    if window is not None:
        seen_RTT &= position_RT[:, :, None] - position_RT[:, None, :] < window
    if chunk is not None:
        seen_RTT &= position_RT[:, :, None] // chunk == position_RT[:, None, :] // chunk
    return seen_RTT


def use_flex_attention(model: nn.Module) -> None:
    """From now on the model reads rows that share prompts through FlexAttention, and all else through SDPA.

    Raises:
        ValueError: the model's attention implementation is another than SDPA, or its attention has a soft cap.
    """
    config = unwrapped(model).config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError("`flex_attention` cannot be used with a model whose attention has a soft cap; leave it off.")
    if config._attn_implementation not in ("sdpa", segments.NAME, flex.NAME):
        raise ValueError(
            f"`flex_attention` takes the place of SDPA, but a model was loaded with {config._attn_implementation!r}. "
            "Load it with `attn_implementation='sdpa'`, or leave `flex_attention` off."
        )
    flex.register()
    config._attn_implementation = flex.NAME


def window_of(config: Any, kind: str) -> int | None:
    """How far back layers of this kind see, in positions; ``None`` if to the beginning."""
    return config.sliding_window if kind == "sliding_attention" else None


def use_segments(model: nn.Module) -> None:
    """From now on, a model that uses SDPA reads long rows that share prompts in segments. For CPUs."""
    config = unwrapped(model).config.get_text_config()
    if config._attn_implementation == "sdpa" and unwrapped(model)._supports_attention_backend:
        segments.register()
        config._attn_implementation = segments.NAME


def _mask(model: nn.Module, tokens: TokenRows, kind: str) -> Any:
    config = unwrapped(model).config.get_text_config()
    window = window_of(config, kind)
    chunk = config.attention_chunk_size if kind == "chunked_attention" else None
    if config._attn_implementation == flex.NAME:
        return flex.block_mask(tokens, window, chunk)
    seen_R1TT = visible_mask(tokens, window, chunk)[:, None]
    if config._attn_implementation == "eager":  # which adds the mask to its scores
        dtype = next(model.parameters()).dtype
        zeros = torch.zeros(seen_R1TT.shape, dtype=dtype, device=seen_R1TT.device)
        return zeros.masked_fill_(~seen_R1TT, torch.finfo(dtype).min)
    return seen_R1TT


def layer_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer; configs without a list have one kind for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
