"""Calls of code that is not part of this package: its errors become errors that name that code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from online_dpo.distributed.settings import kept_settings
from online_dpo.distributed.signals import is_interruption
from online_dpo.distributed.waiting import waiting_for
from online_dpo.errors import OnlineDPOError, ScoringError, named_error, one_line
from online_dpo.types import Group, Prompt

SHOWN_CHARACTERS, SHOWN_ROWS = 60, 8


@contextmanager
def foreign(
    who: str,
    where: str | Callable[[], str] = "",
    raises: Callable[[str], Exception] = ScoringError,
    passes: tuple[type[Exception], ...] = (),
    waits: bool = True,
) -> Iterator[None]:
    """Inside, code of others runs: a user's, or that of a model's or dataset's folder. Its errors are wrapped.

    >>> with foreign("Reward model `rm`", where=lambda: among_rows(groups)):
    ...     scores = model(ids)

    An exception of that code is chained to a new one whose message names the code; one that would end the program, such
    as that of ``sys.exit``, too. Not wrapped are this package's own errors, those in ``passes``, out-of-memory errors
    (a caller may recover from them), and what a signal (Ctrl-C) or the end of a coroutine raises. Settings of the
    process that the code has changed are put back (see `kept_settings`). A notice tells when that code takes long (see
    `distributed.waiting`).

    Args:
        who: the name of the code in the message.
        where: the rows that were processed, for the end of the message; a function is called only if there is an error.
        raises: makes the new error from its message.
        passes: exceptions that are not wrapped.
        waits: whether that code runs here and now, so that it is what this thread waits for.
    """
    try:
        with kept_settings(who), waiting_for(who) if waits else nullcontext():
            yield
    except (OnlineDPOError, torch.OutOfMemoryError, MemoryError, asyncio.CancelledError, GeneratorExit, *passes):
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        rows = where if isinstance(where, str) else where()
        raise raises(f"{who} raised {named_error(error)}{rows and ' '}{rows}") from error


def loading(path: str) -> AbstractContextManager[None]:
    """Inside, a library reads a model folder; its errors, such as that of a damaged file, then name the folder."""
    return foreign(f"Loading `{path}`", raises=ValueError, passes=(OSError, ImportError))


def at_row(prompt: Prompt) -> str:
    """A description of a prompt for a message: its row in the dataset, and how its text begins."""
    content = prompt.content if isinstance(prompt.content, str) else prompt.content[-1].get("content")
    return f"(row {prompt.row}: {one_line(str(content), SHOWN_CHARACTERS)!r})"


def among_rows(groups: Sequence[Group]) -> str:
    """A description of the prompts of several groups for a message, when the error belongs to one of them."""
    prompts = {group.prompt.row: group.prompt for group in groups}
    if len(prompts) < 2:
        return "".join(at_row(prompt) for prompt in prompts.values())
    rows = list(map(str, prompts))
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"(among rows {', '.join(rows[:SHOWN_ROWS])}{more})"


def callable_name(function: Any) -> str:
    """The name of a callable: a function's ``__name__`` (also inside a ``functools.partial``), else its class name."""
    while not hasattr(function, "__name__") and hasattr(function, "func"):
        function = function.func
    return function.__name__ if hasattr(function, "__name__") else type(function).__name__
