"""Code that is not ours: what it raises becomes an error that says whose it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from online_dpo.errors import OnlineDPOError, ScoringError, named_error
from online_dpo.types import Group, Prompt

SHOWN_CHARACTERS, SHOWN_ROWS = 60, 8


@contextmanager
def foreign(
    who: str,
    where: str | Callable[[], str] = "",
    raises: Callable[[str], Exception] = ScoringError,
    passes: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Inside, code runs that is not ours: a user's, or that of a model's or dataset's folder.

    >>> with foreign("Reward model `rm`", where=lambda: among_rows(groups)):
    ...     scores = model(ids)

    What it raises is chained behind an error of ours that names it. Errors of ours pass through, and those of
    ``passes``; so do running out of memory, from which a caller may recover, and what ends a program (Ctrl-C).

    Args:
        who: what a message calls it.
        where: at which row, appended to the message; called only then if it is a function.
        raises: makes the error of its message.
    """
    try:
        yield
    except (OnlineDPOError, torch.OutOfMemoryError, MemoryError, *passes):
        raise
    except Exception as error:
        place = where if isinstance(where, str) else where()
        raise raises(f"{who} raised {named_error(error)}{place and ' '}{place}") from error


def loading(path: str) -> AbstractContextManager[None]:
    """Errors of libraries that read a model folder, such as of a damaged file, name it."""
    return foreign(f"Loading `{path}`", raises=ValueError, passes=(OSError, ImportError))


def at_row(prompt: Prompt) -> str:
    """Which prompt it was, for a message: its row in the dataset, and how it begins."""
    content = prompt.content if isinstance(prompt.content, str) else prompt.content[-1].get("content")
    text = " ".join(str(content).split())
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"(row {prompt.row}: {shown!r})"


def among_rows(groups: Sequence[Group]) -> str:
    """The same of several prompts, of which one was it."""
    prompts = {group.prompt.row: group.prompt for group in groups}
    if len(prompts) < 2:
        return "".join(at_row(prompt) for prompt in prompts.values())
    rows = list(map(str, prompts))
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"(among rows {', '.join(rows[:SHOWN_ROWS])}{more})"


def callable_name(function: Any) -> str:
    """``__name__`` of a function, the inner one of a ``functools.partial``, else the class name of the object."""
    while not hasattr(function, "__name__") and hasattr(function, "func"):
        function = function.func
    return function.__name__ if hasattr(function, "__name__") else type(function).__name__
