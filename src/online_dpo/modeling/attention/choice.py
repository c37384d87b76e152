"""Which attention function a model computes with: the fastest for its device that it can use."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from online_dpo.modeling.attention import flex, sdpa, segments
from online_dpo.modeling.introspection import unwrapped

logger = logging.getLogger(__name__)

OURS = {flex.NAME, sdpa.NAME, segments.NAME}


def choose_attention(
    model: nn.Module,
    name: str,
    device: torch.device,
    share: bool,
    flex_attention: bool | None = None,
    unfit: str | None = None,
    trains: bool = False,
) -> None:
    """Sets the attention of a model that uses SDPA: on a CPU segments, on a GPU FlexAttention where it can be used,
    else SDPA with a kernel that suits. Other implementations stay.

    Args:
        name: name of the model in messages.
        share: whether rows that share prompts are wanted; without them there is nothing for segments or FlexAttention.
        flex_attention: whether to use it; when not given, where the model can.
        unfit: why the run cannot use FlexAttention, whatever the model.
        trains: whether the model computes in training mode, in which its attention may have dropout.

    Raises:
        ValueError: FlexAttention is demanded, and the model or the run cannot use it.
    """
    if not isinstance(unwrapped(model), PreTrainedModel):
        return
    if device.type == "cpu":
        if share and flex_attention is not True:
            use_segments(model)
    elif device.type == "cuda":
        wanted = share and flex_attention is not False
        reason = (why_not_flex(model, trains) or unfit) if wanted else None
        if reason is not None and flex_attention:
            raise ValueError(f"`flex_attention=True` cannot be used with {name}: {reason}. Leave it unset.")
        if reason is not None:
            logger.warning("FlexAttention is not used for %s: %s.", name, reason)
        if wanted and reason is None:
            use_flex_attention(model)
        else:
            use_sdpa(model)


def why_not_flex(model: nn.Module, trains: bool) -> str | None:
    """Why this model cannot use FlexAttention, as far as its class and config tell; ``None`` if it can."""
    base: Any = unwrapped(model)
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft cap"
    if config._attn_implementation not in {"sdpa", *OURS}:
        return f"it was loaded with `attn_implementation={config._attn_implementation!r}`, and not with 'sdpa'"
    if not base._supports_attention_backend:
        return "its class has an attention of its own"
    if trains and _attention_drops_out(base):
        return "its attention has dropout"
    return None


def use_flex_attention(model: nn.Module) -> None:
    """Sets the model's attention to FlexAttention for rows that share prompts, and SDPA for all else."""
    flex.register()
    unwrapped(model).config.get_text_config()._attn_implementation = flex.NAME


def uses_flex_attention(model: nn.Module) -> bool:
    """Whether the model reads rows that share prompts through FlexAttention."""
    return unwrapped(model).config.get_text_config()._attn_implementation == flex.NAME


def use_segments(model: nn.Module) -> None:
    """Lets a model that uses SDPA compute attention in long rows segment by segment (`segments`). For CPUs."""
    segments.register()
    _replace_sdpa(model, segments.NAME)


def use_sdpa(model: nn.Module) -> None:
    """Sets the attention of a model that uses SDPA, or FlexAttention, to SDPA with the kernel chosen by us."""
    sdpa.register()
    _replace_sdpa(model, sdpa.NAME)


def _replace_sdpa(model: nn.Module, name: str) -> None:
    config = unwrapped(model).config.get_text_config()
    if config._attn_implementation in {"sdpa", *OURS} and unwrapped(model)._supports_attention_backend:
        config._attn_implementation = name


def _attention_drops_out(model: nn.Module) -> bool:
    """Whether an attention module passes dropout to its attention function while it trains."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if name in ("attention_dropout", "attn_dropout", "dropout_prob")
    )
