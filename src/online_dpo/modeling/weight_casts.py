"""Weights that autocast casts once for many forward passes, instead of in each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm

from online_dpo.distributed.weights import is_whole
from online_dpo.modeling.patching import replaced_forwards


@contextmanager
def weights_cast_once(*models: nn.Module) -> Iterator[None]:
    """Inside, without gradient, autocast casts each weight of these models at most once. The results are the same.

    Autocast keeps its copies only of weights that require a gradient: of a frozen model it casts all weights again in
    each forward pass, which for one token takes longer than the products. So frozen weights are marked as trained
    meanwhile; where no gradient is recorded, this has no other effect. The copies are freed at the end, or earlier by
    `torch.clear_autocast_cache`.
    """
    cast = [model for model in models if torch.is_autocast_enabled(_device(model).type)]
    if not cast:
        yield
        return
    frozen = {parameter for model in cast for parameter in model.parameters() if _is_cast_again(parameter)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(torch.clear_autocast_cache)
        for model in cast:
            stack.enter_context(_norms_in_fp32(model))
        for parameter in frozen:
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
        yield


def _is_cast_again(parameter: nn.Parameter) -> bool:
    plain = type(parameter) is nn.Parameter and is_whole(parameter)
    return plain and not parameter.requires_grad and parameter.dtype == torch.float32


@contextmanager
def _norms_in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, layer norms in half precision have their weights in fp32, to which autocast casts them on a GPU."""
    layers: list[Any] = [module for module in model.modules() if _is_cast_up(module)]
    forwards: dict[nn.Module, Any] = {}
    for layer in layers:
        weight, bias = layer.weight.detach().float(), None if layer.bias is None else layer.bias.detach().float()
        forwards[layer] = partial(_layer_norm, layer.normalized_shape, weight, bias, layer.eps)
    with replaced_forwards(forwards):
        yield


def _is_cast_up(module: nn.Module) -> bool:
    if type(module) is not nn.LayerNorm or "forward" in vars(module) or module.weight is None:
        return False
    half = module.weight.dtype in (torch.bfloat16, torch.float16)
    return half and module.weight.device.type == "cuda" and is_whole(module.weight)


def _layer_norm(
    shape: tuple[int, ...], weight: torch.Tensor, bias: torch.Tensor | None, eps: float, input: torch.Tensor
) -> torch.Tensor:
    return layer_norm(input, shape, weight, bias, eps)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
