"""Weights of linear layers with their adapters merged into a copy, so that decoding runs one product for each layer.

PEFT merges into a stand-in of the base layer, by its own code. So every kind of adapter that it can merge is merged as
PEFT does it, and the model is not touched.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a layer that PEFT has put around another one."""
    if "peft" not in sys.modules:  # if PEFT was never imported, this is not one of its layers
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def computes_as_its_base(layer: Any) -> bool:
    """Whether an adapter layer gives the output of its base layer: disabled, already merged, or nothing is active."""
    return layer.disable_adapters or layer.merged or not layer.active_adapters


def can_give_weights(layer: Any) -> bool:
    """Whether PEFT has a formula for what the adapter adds to the weights, in terms of the weights alone."""
    return hasattr(layer, "get_delta_weight")


@torch.no_grad()
def merged_weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of the base layer with all active adapters merged, in fp32. Autocast has to be off.

    Raises:
        Exception: PEFT cannot merge this adapter; of which class depends on the kind of adapter.
    """
    stand_in = copy.copy(layer.base_layer)
    stand_in._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().to(torch.float32, copy=True), False)
        for name, parameter in layer.base_layer._parameters.items()
    }
    twin = _with_own_containers(layer)
    twin._modules["base_layer"] = stand_in
    twin.merge(safe_merge=False)
    return stand_in.weight.detach(), None if stand_in.bias is None else stand_in.bias.detach()


def _with_own_containers(layer: nn.Module) -> Any:
    """A shallow copy of a layer. Its lists and dicts are its own, so what is set in them does not reach the layer."""
    twin = copy.copy(layer)
    attributes = vars(twin)
    for name, value in attributes.items():
        if isinstance(value, (dict, list)):
            attributes[name] = value.copy()
    return twin


def dithered(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 weights, rounded to half precision so that the mean over many weights keeps what is smaller than a bit.

    Weights that were loaded in bf16 are bf16 numbers. What an adapter adds in its first steps is less than half of
    their last bit, so rounding to the nearest would give the base model again, and completions would come from a policy
    that is some steps old. Here each weight is rounded up if what it has beyond its last bit exceeds a threshold of its
    own, which is the same in every call; weights that need no rounding stay as they are.
    """
    lost_bits = 23 - (7 if dtype == torch.bfloat16 else 10)
    mask = (1 << lost_bits) - 1
    bits = weight.view(torch.int32) + (_thresholds(weight) & mask)
    return (bits & ~mask).view(torch.float32)


def _thresholds(weight: torch.Tensor) -> torch.Tensor:
    """Bits that look random, but depend on row and column alone, (rows, columns) int32."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(1 << 31, (n,), generator=generator, dtype=torch.int32) for n in weight.shape)
    products = rows.to(weight.device)[:, None] * columns.to(weight.device)
    return products >> 12  # of a product, the middle bits are mixed best
