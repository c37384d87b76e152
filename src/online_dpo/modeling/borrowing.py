"""Models that are lent for a while and come back exactly as they were, whatever happens meanwhile.

`kept_flags` is cheap enough for every pass: it knows what the libraries change in passing. :class:`ModelState` knows
everything but the numbers in the weights.
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
"""Where PEFT's models and layers note which adapters are active, in which order, and whether they are switched off."""


@contextmanager
def kept_flags(model: nn.Module) -> Iterator[None]:
    """Afterwards ``requires_grad`` of every parameter, the mode of every module, and the adapters that are active or
    switched off are as they were.
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
            model.train(modes[0][1])  # some modules do more than note the mode
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode inside; afterwards each of its modules is in the mode that it was in."""
    with kept_flags(model):
        model.eval()
        yield model


@contextmanager
def adapter_off(policy: Any) -> Iterator[nn.Module]:
    """A PEFT model in evaluation mode with its adapters switched off.

    PEFT's own `disable_adapter` makes every weight of the active adapters trainable when it ends, also those that
    their owner had frozen.
    """
    with eval_mode(policy), policy.disable_adapter():
        yield policy


@contextmanager
def kept_attributes(holder: object, *names: str) -> Iterator[None]:
    """Afterwards these attributes of the object itself are what they were; one that it had not is gone again."""
    attributes = vars(holder)
    before = {name: attributes[name] for name in names if name in attributes}
    try:
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(before)


class ModelState:
    """All of a model but the numbers in its weights: modules and their attributes, hooks and replaced forwards, modes,
    ``requires_grad``, device and type of weights, configs.

    While it is kept, weights that were moved or cast meanwhile exist twice.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        holders = [*modules, *_configs(value for module in modules for value in vars(module).values())]
        self._attributes = [(holder, _copied(vars(holder))) for holder in holders]
        self._weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for holder, attributes in self._attributes:
            _put_back(vars(holder), attributes)
        for parameter, data, requires_grad in self._weights:
            if (parameter.device, parameter.dtype) != (data.device, data.dtype):
                parameter.data = data
            parameter.requires_grad_(requires_grad)


def restores_models_on_error(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that changes the models it is given: where it fails, they are put back as they were."""

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
    """The models among the values, and among those in lists."""
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, nn.Module)]


def _configs(values: Any) -> list[Any]:
    """The configs of transformers among the values, with those inside of others, each once."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute and, of containers, what they hold."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _put_back(attributes: dict[str, Any], kept: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - kept.keys():
        del attributes[name]
    for name, (value, contents) in kept.items():
        attributes[name] = value
        if contents is not None:  # the same container, to which handles of hooks point
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
