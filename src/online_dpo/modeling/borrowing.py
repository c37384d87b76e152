"""Context managers and snapshots that restore a model's state after it was used or changed, also after an error.

`kept_flags` is cheap enough for every forward pass: it restores only what libraries change on the way.
:class:`ModelState` restores everything except the values of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

P = ParamSpec("P")
T = TypeVar("T")

ModelContext = Callable[[], AbstractContextManager[nn.Module]]
"""Makes a context inside which the model it yields is ready for a forward pass, such as the reference's."""

ADAPTER_ATTRIBUTES = ("_disable_adapters", "_active_adapter", "_adapters_disabled", "active_adapter")
"""Attributes in which PEFT's models and layers store the active adapters, their order, and whether they are disabled.
"""


@contextmanager
def kept_flags(model: nn.Module) -> Iterator[None]:
    """Restores, at the end, ``requires_grad`` of every parameter, the mode (train or eval) of every module, and which
    adapters are active or disabled.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapters = [(vars(m), name, vars(m)[name]) for m in modules for name in ADAPTER_ATTRIBUTES if name in vars(m)]
    try:
        yield
    finally:
        for attributes, name, value in adapters:
            attributes[name] = value
        for parameter, requires_grad in trainable:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        if any(module.training != mode for module, mode in modes):
            model.train(modes[0][1])  # some modules override `train` and do more than set the flag
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is in evaluation mode; at the end, each of its modules returns to the mode it was in."""
    with kept_flags(model):
        model.eval()
        yield model


@contextmanager
def adapter_off(policy: Any) -> Iterator[nn.Module]:
    """Inside, a PEFT model is in evaluation mode with its adapters disabled.

    `eval_mode` restores ``requires_grad`` at the end, because PEFT's own `disable_adapter` leaves every weight of the
    active adapters trainable, also those that the user had frozen.
    """
    with eval_mode(policy), policy.disable_adapter():
        yield policy


@contextmanager
def kept_attributes(owner: object, *names: str) -> Iterator[None]:
    """Restores, at the end, these attributes of the object itself; deletes those that it did not have."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in names if name in attributes}
    try:
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(before)


class ModelState:
    """A snapshot of a model without the values of its weights: modules and their attributes, hooks, replaced forwards,
    modes, ``requires_grad``, device and dtype of weights, configs.

    It refers to the weights' original storage, so weights that are moved or cast meanwhile exist twice in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        owners = [*modules, *_configs(value for module in modules for value in vars(module).values())]
        self._attributes = [(owner, _copied(vars(owner))) for owner in owners]
        self._weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restores the model to the snapshot."""
        for owner, attributes in self._attributes:
            _restore_attributes(vars(owner), attributes)
        for parameter, data, requires_grad in self._weights:
            if (parameter.device, parameter.dtype) != (data.device, data.dtype):
                parameter.data = data
            parameter.requires_grad_(requires_grad)


def restores_models_on_error(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a method that changes the models among its arguments: if it raises, they are restored."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        states = [ModelState(model) for model in _models([*args[1:], *kwargs.values()])]
        try:
            return function(*args, **kwargs)
        except BaseException:
            for state in states:
                state.restore()
            raise

    return guarded


def _models(values: list[Any]) -> list[nn.Module]:
    """The models among the values, and in lists and tuples among them."""
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, nn.Module)]


def _configs(values: Any) -> list[Any]:
    """The configs of transformers among the values, and those nested in them, each once."""
    configs: dict[int, Any] = {}
    queue = list(values)
    while queue:
        value = queue.pop()
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in configs:
            configs[id(value)] = value
            queue += vars(value).values()
    return list(configs.values())


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with, if it is a container, a shallow copy of it."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore_attributes(attributes: dict[str, Any], kept: dict[str, tuple[Any, Any]]) -> None:
    """Sets the attributes of an object to those that `_copied` has kept, in place."""
    for name in attributes.keys() - kept.keys():
        del attributes[name]
    for name, (value, contents) in kept.items():
        attributes[name] = value
        if contents is not None:  # the same container object, because the handles of hooks refer to it
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
