"""The last layer, computed only for the tokens whose hidden states somebody reads.

Every layer but the last has to be computed for all tokens, because later layers attend to all of them. What the last
layer gives a prompt token is read by nobody: there, prompts need keys and values and no more. With eight layers and
long prompts that is a twelfth of a pass; of a reward model's, which is read at the last token of each text, as well.

The layer itself runs as it is. While it does, those of its modules that work on each token alone see the tokens that
are read, and give zeros for all others.

The layer gets a class of its own, derived from the one it had. So whatever transformers puts around the forward of a
layer's class, gradient checkpointing above all, is put around ours as well, and a layer that is computed again in the
backward pass spares the same tokens. (Until 5.22 transformers checkpoints what calls ``forward``, from 5.23 on
``forward`` itself: there, one that is replaced on the object alone is left out when the layer is computed again.)

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
from online_dpo.modeling.introspection import passes_kwargs_to_attention, unwrapped
from online_dpo.modeling.patching import replaced_forwards

TOKEN_BY_TOKEN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Modules of a layer that work on each token alone, wherever a layer has one of this name."""
WORTH_IT = 0.9
"""Share of the tokens that are read, above which the layer is computed as usual."""

_alone = threading.RLock()


def enable_selective_last_layer(model: nn.Module) -> None:
    """Lets the model's body take ``read_X``, the indices of tokens in the flattened rows whose hidden states are read,
    (X,) int64, ascending and unique. The hidden states of all other tokens are then undefined.

    Models that cannot do this are left as they are; `last_layer_kwargs` knows which. Modules are remembered by name, not
    by reference, so that it also holds for copies of the model and for adapters that are added later.
    """
    base: Any = unwrapped(model)
    layer: Any = _last_layer(base)
    if layer is None or "forward" in vars(layer):  # the latter calls a forward that is bound already, as hooks do
        return
    spared = [name for name in TOKEN_BY_TOKEN if _can_be_spared(_submodule(layer, name))]
    if not spared:
        return
    base.takes_read_X = True
    if not isinstance(layer, _Sparing):
        layer.spared = spared
        layer.__class__ = _sparing_class(type(layer))


def last_layer_kwargs(base: nn.Module, read_X: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument for the model's body; none where the model cannot use it.

    Args:
        base: the model under its wrappers (`unwrapped`).
    """
    return {"read_X": read_X} if hasattr(base, "takes_read_X") else {}


def _last_layer(base: Any) -> Any:
    """The last layer, where the model hands its layers all arguments."""
    if not passes_kwargs_to_attention(base):
        return None
    count = base.config.get_text_config().num_hidden_layers
    stacks = (module for module in base.base_model.children() if isinstance(module, nn.ModuleList))
    return next((stack[-1] for stack in stacks if len(stack) == count), None)


def _can_be_spared(module: nn.Module | None) -> bool:
    """Not experts: they get their share of all tokens at once, and what they return is not always a tensor."""
    return module is not None and not any("expert" in name for name, _ in module.named_modules())


def _submodule(module: nn.Module | None, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


class _Sparing:
    """Marks the classes that `_sparing_class` makes."""


@functools.cache
def _sparing_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """A class of layers that take ``read_X``. It has the name of the class it derives from, which is what wrappers of
    sharded models look for.
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, read_X: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        compute = functools.partial(layer_class.forward, self)
        if read_X is None or len(read_X) > WORTH_IT * hidden_states.shape[:-1].numel():
            return compute(hidden_states, *args, **kwargs)
        if kwargs.get("segments") is not None:
            kwargs["segments"] = segments.only_read(kwargs["segments"], read_X, hidden_states.shape[1])
        with _alone:  # one thread at a time: it changes the modules
            modules = [self.get_submodule(name) for name in self.spared]
            with replaced_forwards({module: _sparing(module.forward, read_X) for module in modules}):
                return compute(hidden_states, *args, **kwargs)

    names = {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class, _Sparing), {**names, "forward": forward})


def _sparing(forward: Callable[..., torch.Tensor], read_X: torch.Tensor) -> Callable[..., torch.Tensor]:
    def on_read(hidden_RTH: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given_XH = hidden_RTH.flatten(0, 1)[read_X]
        result_XH = forward(given_XH[None], *args, **kwargs)[0]
        everywhere = result_XH.new_zeros(hidden_RTH.shape[:-1].numel(), result_XH.shape[-1])
        return everywhere.index_copy(0, read_X, result_XH).view(*hidden_RTH.shape[:-1], -1)

    return on_read
