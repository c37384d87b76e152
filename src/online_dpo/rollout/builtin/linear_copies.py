"""Copies of linear layers' weights for decoding, made once for each rollout: in the dtype of the products, adapters
merged, and layers that read the same input side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.functional import linear

from online_dpo.modeling.introspection import computing_dtype, forward_state_key
from online_dpo.modeling.patching import replaced_forwards
from online_dpo.rollout.builtin.linear_layers import LinearLayer, inputs_by_layer, linear_layers, siblings

logger = logging.getLogger(__name__)

_told: WeakSet[nn.Module] = WeakSet()


class LinearCopies:
    """Keeps copies of the weights that decoding multiplies with, at addresses that stay the same.

    Each decoding step computes few rows, so it costs as many kernels and as many bytes of weights as it has products.

    - Autocast casts a layer's weights each time they are used, or keeps copies that it frees when it ends. A captured
      CUDA graph cannot rely on these, so it would cast in every step.
    - An adapter is two more products, and more, for each layer. Merged, it costs nothing.
    - Queries, keys and values are one product, and so are the two of a gated feed-forward layer.

    The copies take as much memory as the layers have weights in that dtype (`nbytes`).
    """

    def __init__(self) -> None:
        self._products: list[_Product] = []
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._groups: list[list[LinearLayer]] = []
        self._state: tuple[Any, ...] = ()
        self._weights_stay = self._is_fresh = False
        self.made = 0
        """How often copies were made, at new addresses."""

    @property
    def nbytes(self) -> int:
        """The bytes that the copies hold."""
        return sum(product.nbytes for product in self._products)

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Inside, weights do not change, so copies are brought up to date once, and not in each use."""
        self._weights_stay, self._is_fresh = True, False
        try:
            yield
        finally:
            self._weights_stay = self._is_fresh = False

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Inside, linear layers multiply with copies of their current weights, without gradient.

        Layers of which a copy would change nothing compute as they are, and so do those that are called in other ways.
        """
        self._refresh(model)
        try:
            with replaced_forwards(self._forwards):
                yield
        finally:
            for product in self._products:
                product.forget()

    def release(self) -> None:
        """Frees the copies; the next use makes new ones, at other addresses."""
        self._products, self._forwards, self._is_fresh = [], {}, False

    @torch.no_grad()
    def _refresh(self, model: nn.Module) -> None:
        """Brings the copies up to date in place. Makes new ones where the model's state is another."""
        state = (*forward_state_key(model), computing_dtype(model))
        dtype = _autocast_dtype(model)
        if state != self._state:
            self.release()
            self._groups, self._state = _groups(model, dtype), state
        if self._groups and not self._products:
            self.made += 1
            self._products = [_Product(group, dtype or group[0].base.weight.dtype) for group in self._groups]
            self._forwards = {layer: forward for product in self._products for layer, forward in product.forwards()}
        if not self._is_fresh:
            for product in self._products:
                product.refresh()
        self._is_fresh = self._weights_stay


def _autocast_dtype(model: nn.Module) -> torch.dtype | None:
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _groups(model: nn.Module, dtype: torch.dtype | None) -> list[list[LinearLayer]]:
    """The layers to compute, those together that read the same input. Warns of adapters that cannot be merged."""
    layers, left = linear_layers(model)
    if left and model not in _told:
        _told.add(model)
        reasons = "; ".join(f"{reason} ({count} layers)" for reason, count in left.items())
        logger.warning("Adapters are not merged into a copy for sampling, which is slower with them: %s.", reasons)
    groups = siblings(model, layers, inputs_by_layer(model, layers, dtype)) if layers else []
    return [group for group in groups if len(group) > 1 or _differs(group[0], dtype)]


def _differs(each: LinearLayer, dtype: torch.dtype | None) -> bool:
    """Whether a product with a copy is another than what the layer does itself."""
    return each.merges or dtype not in (None, each.base.weight.dtype)


class _Product:
    """One product for one layer, or for several that read the same input: then each output is a part of it."""

    def __init__(self, layers: Sequence[LinearLayer], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.sizes = [each.base.weight.shape[0] for each in layers]
        first = layers[0].base
        shape = (sum(self.sizes), first.weight.shape[1])
        self.weight = torch.empty(shape, dtype=dtype, device=first.weight.device)
        bias = sum(each.base.bias.shape[0] for each in layers) if first.bias is not None else 0
        self.bias = torch.empty(bias, dtype=dtype, device=first.weight.device) if first.bias is not None else None
        # One object for each layer, for good: compiled code is kept for as long as it finds the same one.
        self._forwards = [self._forward_of(place) for place in range(len(layers))]
        self.forget()

    @property
    def nbytes(self) -> int:
        """The bytes of the copies."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Each layer with what is to be its ``forward``."""
        return zip((each.layer for each in self.layers), self._forwards, strict=True)

    def refresh(self) -> None:
        """Copies the present weights, in place."""
        biases = [None] * len(self.layers) if self.bias is None else self.bias.split(self._bias_sizes())
        for each, weight, bias in zip(self.layers, self.weight.split(self.sizes), biases, strict=True):
            present, present_bias = each.weights(self.dtype)
            weight.copy_(present)
            if bias is not None and present_bias is not None:
                bias.copy_(present_bias)

    def forget(self) -> None:
        """Frees the last input and what was computed of it."""
        self._input: torch.Tensor | None = None
        self._version = 0
        self._outputs: tuple[torch.Tensor, ...] = ()

    def _forward_of(self, place: int) -> Callable[..., Any]:
        if self.layers[0].transposed:
            assert self.bias is not None  # these layers always have one
            return partial(_transposed_linear, self.weight, self.bias)
        if len(self.layers) == 1:
            return partial(_linear, self.weight, self.bias)
        return partial(self._part, place)

    def _part(self, place: int, input: torch.Tensor) -> torch.Tensor:
        """The output of one layer. The first layer's call computes all of them, and the last one's forgets them.

        Another input than the first layer's, or the same one after it was changed in place, is computed by itself.
        """
        if place == 0:
            self._input, self._version = input, _version(input)
            self._outputs = linear(input, self.weight, self.bias).split(self.sizes, dim=-1)
            return self._outputs[0]
        if input is not self._input or _version(input) != self._version:
            rows = slice(sum(self.sizes[:place]), sum(self.sizes[: place + 1]))
            return linear(input, self.weight[rows], None if self.bias is None else self.bias[rows])
        output = self._outputs[place]
        if place == len(self.layers) - 1:
            self.forget()
        return output

    def _bias_sizes(self) -> list[int]:
        return [each.base.bias.shape[0] for each in self.layers]


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place. A compiler does not know; but layers are only computed together if
    nothing changed their input in between when the model's code ran last.
    """
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return linear(input, weight, bias)


def _transposed_linear(weight: torch.Tensor, bias: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, input.view(-1, input.shape[-1]), weight).view(*input.shape[:-1], -1)
