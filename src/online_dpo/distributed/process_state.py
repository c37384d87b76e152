"""What belongs to the whole process, and is put back after use: random states and environment variables."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Afterwards the generators of Python, NumPy, torch and the present CUDA device go on from where they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These environment variables while it lasts."""
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
    """Afterwards the environment holds what it held, and ``os.environ`` is the same object.

    `datasets` puts another one in its place when it maps with several processes. What holds the one of before, as rich
    does, would then see no change any more.
    """
    before, values = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = before  # noqa: B003 (it was there before)
        for name in before.keys() - values.keys():
            del before[name]
        before.update(values)
