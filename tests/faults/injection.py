"""What a fault's ``inject`` gets, and actions that happen at the places it names."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Action = Callable[[], None]


def sends(number: int) -> Action:
    """This process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


def kills() -> Action:
    return sends(signal.SIGKILL)


def raises(error: BaseException) -> Action:
    def action() -> None:
        raise error

    return action


def out_of_memory() -> Action:
    """As torch says it on a GPU."""
    import torch

    return raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))


@dataclass(frozen=True)
class Child:
    """The process in which `main` is about to run; ``folder`` is its working folder."""

    folder: Path
    rank: int

    def patch(self, target: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replaces ``package.module:Class.function`` by what ``wrap`` makes of it."""
        module, _, names = target.partition(":")
        *owners, name = names.split(".")
        owner: Any = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))

    def at_call(self, target: str, number: int | None, action: Action, after: bool = False) -> None:
        """Does ``action`` before (or ``after``) the call with this number, from 1, or every call if it is `None`."""
        calls = [0]

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                due = number in (None, calls[0])
                if due and not after:
                    action()
                result = original(*args, **kwargs)
                if due and after:
                    action()
                return result

            return call

        self.patch(target, wrap)

    def at_step(self, step: int, action: Action) -> None:
        """As this step (from 1) begins: its completions are there, nothing of it is trained yet."""
        self.at_call("transformers.trainer_callback:CallbackHandler.on_step_begin", step, action)

    def at_step_end(self, step: int, action: Action) -> None:
        """As this step (from 1) has ended, before anything is logged or saved."""
        self.at_call("transformers.trainer_callback:CallbackHandler.on_step_end", step, action)
