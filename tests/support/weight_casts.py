"""Counts how often each weight of a model is cast."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class WeightCasts(TorchDispatchMode):
    """Inside, and in this thread: ``counts`` has the number of casts of each weight that is cast at all, by its name
    after its model's place."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        named = [(f"{place}.{name}", p) for place, model in enumerate(models) for name, p in model.named_parameters()]
        self._names = {parameter.untyped_storage()._cdata: name for name, parameter in named}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._names:
            self.counts[self._names[args[0].untyped_storage()._cdata]] += 1
        return func(*args, **(kwargs or {}))
