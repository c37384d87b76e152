"""What ``train`` and ``eval`` have in common: a run file, if any, then fields; they are checked, and only then run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from online_dpo import versions
from online_dpo.cli.runfile.entries import COMMAND_LINE, UsageError

WRONG_INPUT = 2
CONFIG = "--config"
HELP_ALL = "--help-all"
HELP_WORDS = ("--help", "-h", HELP_ALL, "--help_all")

Plan = TypeVar("Plan")


def planned(
    words: Sequence[str],
    *,
    usage: str,
    help: Callable[[Sequence[str]], str],
    plan: Callable[[Path | None, Sequence[str]], Plan],
    run: Callable[[Plan, list[str], bool], int],
) -> int:
    """Carry out a command and return its exit code, `WRONG_INPUT` where the words are no good.

    Args:
        usage: what is shown where there are no words.
        help: what is shown for ``--help``, given the words that follow it, or ``--help-all``.
        plan: checks the run file and the words behind it.
        run: what then happens. It gets the plan, the words without ``--traceback``, and whether that was among them.
    """
    if not words:
        print(usage, file=sys.stderr)
        return WRONG_INPUT
    kept = [word for word in words if word != "--traceback"]
    try:
        asked = next((place for place, word in enumerate(words) if word in HELP_WORDS), None)
        if asked is not None:
            print(help([HELP_ALL] if words[asked] == HELP_ALL else words[asked + 1 :]))
            return 0
        made = plan(*split_words(kept))
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    say_untested_versions()
    return run(made, kept, "--traceback" in words)


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run file, which is the first word or stands behind ``--config``, and the words that are fields.

    Raises:
        UsageError: two files are given, or none behind ``--config``.
    """
    files, rest = [], list(words)
    if rest and not rest[0].startswith("-"):
        files.append(rest.pop(0))
    while (place := next((i for i, word in enumerate(rest) if word.partition("=")[0] == CONFIG), None)) is not None:
        _, equals, value = rest.pop(place).partition("=")
        if not equals:
            value = rest.pop(place) if place < len(rest) and not rest[place].startswith("--") else ""
        if not value:
            raise UsageError([f"{COMMAND_LINE}: `{CONFIG}` needs the name of a run file: {CONFIG} run.yaml"])
        files.append(value)
    if len(files) > 1:
        raise UsageError([f"{COMMAND_LINE}: there are two run files, {' and '.join(files)}. Give one of them."])
    return (Path(files[0]).expanduser() if files else None), rest


def say_untested_versions() -> None:
    """Before the heavy imports, which an untested version may break."""
    warning = versions.warning()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
