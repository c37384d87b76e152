"""Copies of linear layers' weights in autocast's dtype, made once for each rollout instead of in each decoding step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from online_dpo.modeling.patching import replaced_forwards


class CastLinears:
    """Keeps a copy of each linear layer's weights in autocast's dtype, at an address that stays the same.

    Autocast itself casts a layer's weights each time they are used, or keeps the cast copies in a cache that is emptied
    when autocast ends. A captured CUDA graph cannot rely on such a cache, so it would cast in every step, and for one
    token that takes longer than the matrix product.
    """

    def __init__(self) -> None:
        self._copies: dict[nn.Linear, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Inside, linear layers multiply with copies of their current weights, without gradient.

        Only under autocast, and only layers whose weights have another dtype than autocast's.
        """
        device = next(model.parameters()).device.type
        forwards: dict[nn.Module, Any] = {}
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype != dtype]
            layers = [layer for layer in layers if "forward" not in vars(layer)]  # a hook or wrapper owns the others
            forwards = {layer: partial(_forward, *self._copy(layer, dtype)) for layer in layers}
        with replaced_forwards(forwards):
            yield

    def release(self) -> None:
        """Frees the copies."""
        self._copies.clear()

    def _copy(self, layer: nn.Linear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The copies of a layer's weight and bias, brought up to date in place."""
        if layer not in self._copies:
            bias = None if layer.bias is None else torch.empty_like(layer.bias, dtype=dtype)
            self._copies[layer] = torch.empty_like(layer.weight, dtype=dtype), bias
        weight, bias = self._copies[layer]
        weight.copy_(layer.weight)
        if bias is not None:
            bias.copy_(layer.bias)
        return weight, bias


def _forward(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return linear(input, weight, bias)
