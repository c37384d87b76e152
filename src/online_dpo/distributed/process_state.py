"""Context managers that restore state of the whole process: random generators and environment variables."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """The state of the random generators of Python, NumPy, torch and the current CUDA device at one moment."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Return the present state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores, at the end, the random generators of Python, NumPy, torch and the current CUDA device."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Inside, these environment variables are set; at the end, they have their previous values, or are unset."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restores, at the end, all environment variables, and the object ``os.environ`` itself.

    `datasets` replaces that object when it maps with several processes. Code that has kept the previous one, such as
    rich, would then see no changes any more.
    """
    before, values = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = before  # noqa: B003 (this is the original object)
        for name in before.keys() - values.keys():
            del before[name]
        before.update(values)
