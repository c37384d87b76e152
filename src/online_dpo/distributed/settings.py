"""Settings of the whole process that code of others may change: they are put back."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A setting of the process: how a message names it, how it is read, and how it is set."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def working_folder() -> str | None:
    """The working folder; ``None`` if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _change_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


SETTINGS = (
    Setting("the working folder", working_folder, _change_folder),
    Setting("torch's default type", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, torch.set_default_device),
    Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("standard output", lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    Setting("standard error", lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    Setting("`sys.excepthook`", lambda: sys.excepthook, lambda hook: setattr(sys, "excepthook", hook)),
    Setting(
        "`threading.excepthook`", lambda: threading.excepthook, lambda hook: setattr(threading, "excepthook", hook)
    ),
    Setting("the level below which nothing is logged", lambda: logging.root.manager.disable, logging.disable),
)
"""They decide where a run writes, what it computes, or whether it can tell anything."""


@contextmanager
def kept_settings(who: str) -> Iterator[None]:
    """Puts back, at the end, `SETTINGS`, gradient and inference mode, and torch's random state if it was seeded. A
    warning says what ``who`` has changed.

    Numbers that are drawn stay drawn: only a seed makes training repeat what it has drawn before. It is put back in the
    main thread only, since another thread may run while training draws.
    """
    before = [setting.read() for setting in SETTINGS]
    is_main = threading.current_thread() is threading.main_thread()
    seed, random_state = torch.initial_seed(), torch.get_rng_state()
    has_gradient = torch.is_grad_enabled()  # entering an inference mode, also the same one, changes it
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(has_gradient):
            yield
    finally:
        changed = list(_put_back(before))
        if is_main and _was_seeded(seed, random_state):
            torch.set_rng_state(random_state)
            changed.append("torch's random state")
        if changed:
            _tell_once(f"{who} changed {' and '.join(changed)}, which is put back.")


@cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def _put_back(before: list[Any]) -> Iterator[str]:
    for setting, value in zip(SETTINGS, before, strict=True):
        if setting.read() != value:
            setting.write(value)
            yield setting.name


def _was_seeded(seed: int, before: torch.Tensor) -> bool:
    """Whether the generator has been seeded since, with another seed, or with the same one and not used afterwards."""
    after = torch.get_rng_state()
    if torch.equal(before, after):
        return False
    return torch.initial_seed() != seed or torch.equal(after, _seeded(seed))


@lru_cache(maxsize=4)
def _seeded(seed: int) -> torch.Tensor:
    return torch.Generator().manual_seed(seed).get_state()
