"""Temporary replacement of modules' ``forward`` methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each of these modules uses the given ``forward``; at the end, the one it had before.

    Another thread may replace forwards of the same modules at the same time, and end first. A forward that it has
    already restored is left as it is, so whatever the order, no replacement stays behind.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            replacement = vars(module).pop("forward", None)
            if replacement is not None and forward is not None:
                module.forward = forward
