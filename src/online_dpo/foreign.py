"""Code that is not ours: what it raises becomes an error that says whose it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from online_dpo.errors import OnlineDPOError, ScoringError


@contextmanager
def foreign(
    who: str,
    where: str | Callable[[], str] = "",
    raises: Callable[[str], Exception] = ScoringError,
    passes: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Inside, code runs that is not ours: a user's, or that of a model's or dataset's folder.

    >>> with foreign("Reward model `rm`", where=lambda: about(prompt)):
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
    except (OnlineDPOError, torch.OutOfMemoryError, *passes):
        raise
    except Exception as error:
        place = where if isinstance(where, str) else where()
        said = str(error) or "(no message)"
        raise raises(f"{who} raised {type(error).__name__}: {said}{place and ' '}{place}") from error
