"""Checks for policies that would not be trained as the user expects."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from online_dpo.modeling.introspection import unwrapped


def warn_of_auxiliary_loss(model: nn.Module) -> None:
    """Warn if the model's config asks for a loss that balances experts, which is not added here."""
    config: Any = unwrapped(model).config.get_text_config()
    if getattr(config, "output_router_logits", False):
        warnings.warn(
            "The model's config has `output_router_logits=True`, which adds a loss that balances experts to its own "
            "loss. It is not added here: the loss is that of `loss_type` alone.",
            stacklevel=4,
        )


def check_unmerged(model: nn.Module) -> None:
    """Check that no adapter is merged into the weights, where it gets no gradient.

    Raises:
        ValueError: an adapter is merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"The policy's adapter {merged[0]!r} is merged into the weights, where it cannot be trained. Call "
            "`model.unmerge_adapter()` first, or `model.merge_and_unload()` to train all weights."
        )
