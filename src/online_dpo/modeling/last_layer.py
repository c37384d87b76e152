"""The last layer, computed only for the tokens whose final hidden states are used.

Every other layer must be computed for all tokens, because later layers attend to all of them. The last layer's output
for a prompt token is not used: there, prompts need only their keys and values. With eight layers and long prompts this
saves a twelfth of a forward pass, and as much in a reward model, which uses only the last token of each text.

The layer's own code runs unchanged. While it does, those of its modules that are token-wise (compute each token
independently of the others) receive only the tokens that are used, and return zeros for all others.

The layer gets a new class, derived from its own. So everything that transformers wraps around a layer class's forward,
gradient checkpointing above all, is wrapped around ours too, and a layer that is recomputed in the backward pass skips
the same tokens. (Until 5.22 transformers checkpoints the caller of ``forward``, from 5.23 on ``forward`` itself: there,
a ``forward`` that is replaced on the object alone would not run in the recomputation.)

Shapes: ``R`` rows, ``T`` tokens of a row, ``X`` tokens that are read, ``H`` hidden size.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from online_dpo.modeling.attention import segments
from online_dpo.modeling.introspection import decoder_layers, passes_kwargs_to_attention, unwrapped
from online_dpo.modeling.patching import replaced_forwards

TOKEN_WISE_MODULES = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""The token-wise modules of a layer, by the names that decoders of transformers use. Keys and values are not among
them: other tokens attend to them.
"""
MAX_READ_SHARE = 0.9
"""If more than this share of the tokens is read, the layer is computed as usual: selecting tokens costs time too."""

_patch_lock = threading.RLock()


def enable_selective_last_layer(model: nn.Module) -> None:
    """Lets the model's body take ``read_X``, the indices of tokens in the flattened rows whose hidden states are read,
    (X,) int64, ascending and unique. The hidden states of all other tokens are then undefined.

    Models that cannot do this are left as they are; `last_layer_kwargs` knows which. Modules are remembered by name,
    not by reference, so that it also holds for copies of the model and for adapters that are added later.
    """
    base: Any = unwrapped(model)
    layer: Any = _last_layer(base)
    # A `forward` on the layer itself, as hooks of accelerate leave it, calls one that is already bound to the old
    # class.
    if layer is None or "forward" in vars(layer):
        return
    token_wise = [name for name in TOKEN_WISE_MODULES if _is_token_wise(_submodule(layer, name))]
    if not token_wise:
        return
    base.takes_read_X = True
    if not isinstance(layer, _SelectiveLayer):
        layer.token_wise = token_wise
        layer.__class__ = _selective_class(type(layer))


def last_layer_kwargs(base: nn.Module, read_X: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keyword argument ``read_X`` for the model's body; empty if the model cannot use it.

    Args:
        base: the model without its wrappers (`unwrapped`).
    """
    return {"read_X": read_X} if hasattr(base, "takes_read_X") else {}


def _last_layer(base: Any) -> Any:
    """The last layer; ``None`` unless the model passes further keyword arguments on to its layers."""
    if not passes_kwargs_to_attention(base):
        return None
    layers = decoder_layers(base)
    return None if layers is None else layers[-1]


def _is_token_wise(module: nn.Module | None) -> bool:
    """Whether the module can be given a part of the tokens. Mixtures of experts cannot: how they route tokens may
    depend on all of them, and what they return is not always a tensor.
    """
    return module is not None and not any("expert" in name for name, _ in module.named_modules())


def _submodule(module: nn.Module | None, name: str) -> nn.Module | None:
    """The submodule with this dotted name, or ``None``."""
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


class _SelectiveLayer:
    """A marker: the base of all classes that `_selective_class` makes."""


@functools.cache
def _selective_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer class whose ``forward`` takes ``read_X``.

    It has the name of its base class, because FSDP's wrapping policies find layer classes by name.
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, read_X: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        compute = functools.partial(layer_class.forward, self)
        if read_X is None or len(read_X) > MAX_READ_SHARE * hidden_states.shape[:-1].numel():
            return compute(hidden_states, *args, **kwargs)
        if kwargs.get("segments") is not None:
            kwargs["segments"] = segments.trim_to_read(kwargs["segments"], read_X, hidden_states.shape[1])
        with _patch_lock:  # the modules are patched, so one thread at a time
            modules = [self.get_submodule(name) for name in self.token_wise]
            with replaced_forwards({module: _on_read_tokens(module.forward, read_X) for module in modules}):
                return compute(hidden_states, *args, **kwargs)

    names = {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class, _SelectiveLayer), {**names, "forward": forward})


def _on_read_tokens(forward: Callable[..., torch.Tensor], read_X: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A module's ``forward``, computed for the tokens ``read_X`` only, with zeros for all others."""

    def on_read(hidden_RTH: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        input_XH = hidden_RTH.flatten(0, 1)[read_X]
        output_XH = forward(input_XH[None], *args, **kwargs)[0]
        zeros = output_XH.new_zeros(hidden_RTH.shape[:-1].numel(), output_XH.shape[-1])
        return zeros.index_copy(0, read_X, output_XH).view(*hidden_RTH.shape[:-1], -1)

    return on_read
