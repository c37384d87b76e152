"""How processes of a run ended, in words and as what follows from it. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping


def how_it_ended(code: int) -> str:
    """The end of a process in words, after its name.

    >>> how_it_ended(1), how_it_ended(-9)
    ('has ended with exit code 1', 'was killed by SIGKILL')
    """
    if code >= 0:
        return f"has ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def run_code(codes: Mapping[int, int], *, server_lost: bool) -> int | None:
    """The exit code of a run, or ``None`` if it is to be started again.

    A process that was killed is lost. One that has ended with an error of its own would do so again; but where a server
    was lost meanwhile, that may have been the cause.

    Args:
        codes: the exit code of each rank, or the negative number of the signal that killed it.
        server_lost: whether a server was away.
    """
    if any(code < 0 for code in codes.values()):
        return None
    failed = next((codes[rank] for rank in sorted(codes) if codes[rank] != 0), 0)
    return None if failed == 1 and server_lost else failed
