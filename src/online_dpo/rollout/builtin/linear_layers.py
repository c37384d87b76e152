"""The linear layers of a model that decoding may compute in another way, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from online_dpo.distributed.weights import is_whole
from online_dpo.errors import named_error
from online_dpo.modeling.patching import replaced_forwards
from online_dpo.rollout.builtin.merged_adapters import (
    can_give_weights,
    computes_as_its_base,
    dithered,
    is_adapter_layer,
    merged_weights,
)

HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A layer whose output is a product of its input with weights.

    ``layer`` is the module that is called, and ``base`` the linear layer that holds the weights: the same, or what an
    adapter layer is around. With ``merges``, the adapter changes the weights.
    """

    layer: nn.Module
    base: Any
    merges: bool = False

    @property
    def transposed(self) -> bool:
        """Whether the weight's first dimension is that of the input, as in GPT-2."""
        return type(self.base) is Conv1D

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The present weight and bias, with adapters; they may have more digits than ``dtype``, to which they go."""
        if not self.merges:
            return self.base.weight.detach(), None if self.base.bias is None else self.base.bias.detach()
        with torch.autocast(self.base.weight.device.type, enabled=False):
            weight, bias = merged_weights(self.layer)
        was_rounded = dtype in HALF_PRECISION and self.base.weight.dtype == dtype
        return dithered(weight, dtype) if was_rounded else weight, bias


def linear_layers(model: nn.Module) -> tuple[list[LinearLayer], dict[str, int]]:
    """The linear layers of the model, each adapter layer as one where it can be merged; and for how many adapter layers
    it cannot, by reason.

    Layers are left out if a hook or wrapper owns their ``forward``, or if their weights are quantised or in parts.
    """
    found: list[LinearLayer] = []
    left: dict[str, int] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or "forward" in vars(module):
            continue
        if is_adapter_layer(module):
            layer: Any = module
            if layer.disable_adapters and layer.merged:  # its next call takes the adapter out of the base's weights
                inside |= set(module.modules())
                continue
            reason = _why_not_one_product(layer)
            if reason is None:
                found.append(LinearLayer(layer, layer.base_layer, merges=not computes_as_its_base(layer)))
                inside |= set(module.modules())
            elif not computes_as_its_base(layer):
                left[reason] = left.get(reason, 0) + 1
        elif _is_plain_linear(module):
            found.append(LinearLayer(module, module))
    return found, left


def _why_not_one_product(layer: Any) -> str | None:
    """Why an adapter layer cannot be computed as one product with its base's weights; ``None`` if it can."""
    base = layer.base_layer
    if not _is_plain_linear(base):
        return f"adapters of `{type(base).__name__}` are not merged"
    inner = [module for module in layer.modules() if module is not layer]
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in inner):
        return "hooks are registered inside of the adapter"
    if computes_as_its_base(layer):
        return None
    if not can_give_weights(layer):
        return f"`{type(layer).__module__}` does not say what it adds to the weights"
    try:
        with torch.autocast(base.weight.device.type, enabled=False):
            merged_weights(layer)
    except Exception as error:  # what PEFT raises depends on the kind of adapter
        return named_error(error)
    return None


def _is_plain_linear(module: Any) -> bool:
    if type(module) not in (nn.Linear, Conv1D):
        return False
    weight = module.weight
    return weight.is_floating_point() and is_whole(weight) and not is_traceable_wrapper_subclass(weight)


Inputs = dict[nn.Module, list[tuple[torch.Tensor, int]]]
"""What layers have read, in the order of their first calls: each input, and how often it had been changed in place."""


@torch.no_grad()
def inputs_by_layer(model: nn.Module, layers: Iterable[LinearLayer], dtype: torch.dtype | None) -> Inputs:
    """What these layers read in a forward pass of one token, in which they compute nothing and return zeros.

    Layers that were not called are missing, and so are those that were called with other arguments than one tensor.

    Args:
        dtype: of what the layers return; by default that of their weights.
    """
    inputs: Inputs = {}
    other_calls: set[nn.Module] = set()

    def returning_zeros(each: LinearLayer) -> Callable[..., Any]:
        own = each.layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
                other_calls.add(each.layer)
                return own(*args, **kwargs)
            inputs.setdefault(each.layer, []).append((args[0], args[0]._version))
            size = each.base.weight.shape[1 if each.transposed else 0]
            return args[0].new_zeros(*args[0].shape[:-1], size, dtype=dtype or each.base.weight.dtype)

        return forward

    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with replaced_forwards({each.layer: returning_zeros(each) for each in layers}):
        model(input_ids=ids_11, attention_mask=torch.ones_like(ids_11), use_cache=False)
    return {layer: seen for layer, seen in inputs.items() if layer not in other_calls}


def siblings(model: nn.Module, layers: Iterable[LinearLayer], inputs: Inputs) -> list[list[LinearLayer]]:
    """The layers that are called, those together that are children of one module and read the same input, in the order
    of their calls: the projections to queries, keys and values, for example.
    """
    parents = {module: name.rpartition(".")[0] for name, module in model.named_modules()}
    by_layer = {each.layer: each for each in layers}
    together: dict[Hashable, list[LinearLayer]] = {}
    for module, seen in inputs.items():
        each = by_layer[module]
        weight, key = each.base.weight, (module,)
        if len(seen) == 1 and not each.transposed:
            [(tensor, version)] = seen
            key = (parents[module], id(tensor), version, weight.dtype, weight.device, each.base.bias is None)
        together.setdefault(key, []).append(each)
    return list(together.values())
