"""What ``train`` and ``eval`` have in common: a run file, if any, then fields; they are checked, and only then run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from online_dpo import versions
from online_dpo.cli.run_file import UsageError

WRONG_INPUT = 2

Plan = TypeVar("Plan")


def planned(
    words: Sequence[str],
    *,
    usage: str,
    help: Callable[[], str],
    plan: Callable[[Path | None, Sequence[str]], Plan],
    run: Callable[[Plan, list[str], bool], int],
) -> int:
    """Carry out a command and return its exit code, `WRONG_INPUT` where the words are no good.

    Args:
        usage: what is shown where there are no words.
        help: what is shown for ``--help``.
        plan: checks the run file and the words behind it.
        run: what then happens. It gets the plan, the words without ``--traceback``, and whether that was among them.
    """
    if not words:
        print(usage, file=sys.stderr)
        return WRONG_INPUT
    if "--help" in words or "-h" in words:
        print(help())
        return 0
    kept = [word for word in words if word != "--traceback"]
    has_file = bool(kept) and not kept[0].startswith("--")
    try:
        made = plan(Path(kept[0]) if has_file else None, kept[1:] if has_file else kept)
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    say_untested_versions()
    return run(made, kept, "--traceback" in words)


def say_untested_versions() -> None:
    """Before the heavy imports, which an untested version may break."""
    warning = versions.warning()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
