"""What an optimizer updates, and where in it each number of each parameter lies: for state that any number of ranks can
read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn


@dataclass(frozen=True)
class Span:
    """Numbers of a parameter that lie in a tensor of the optimizer: those from ``start`` on, of the parameter as one
    row; in the tensor, also as one row, they begin at ``offset``.

    >>> Span("lm_head.weight", start=1024, offset=0, numel=512)
    """

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Updated:
    """What this rank's optimizer updates: its tensors, which are the keys of its state, and what lies in each.

    All of it may be changed in place, also ``scaling``: the state of a loss scaling that the optimizer does itself.
    """

    optimizer: torch.optim.Optimizer
    tensors: list[tuple[torch.Tensor, list[Span]]]
    scaling: dict[str, Any] = field(default_factory=dict)


def updated_parameters(model: nn.Module, optimizer: Any, place: Callable[[torch.Tensor], tuple[int, int]]) -> Updated:
    """Returns what an optimizer of the model's own parameters updates.

    Args:
        place: where the part of a parameter that this rank holds begins, and how many numbers it has.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = []
    for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
        start, numel = place(parameter)
        tensors.append((parameter, [Span(names[id(parameter)], start, 0, numel)]))
    return Updated(inner, tensors)
