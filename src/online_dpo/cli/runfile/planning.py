"""The common part of ``train`` and ``eval``: an optional run file and fields are checked, and only then run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from online_dpo import versions
from online_dpo.cli.parser import WRONG_INPUT
from online_dpo.cli.runfile.entries import COMMAND_LINE, UsageError

CONFIG = "--config"
HELP_ALL = "--help-all"
HELP_WORDS = ("--help", "-h", HELP_ALL, "--help_all")

Plan = TypeVar("Plan")


def run_checked(
    words: Sequence[str],
    *,
    usage: str,
    help: Callable[[Sequence[str]], str],
    plan: Callable[[Path | None, Sequence[str]], Plan],
    run: Callable[[Plan, list[str], bool], int],
) -> int:
    """Check the words of a command, run it, and return its exit code, `WRONG_INPUT` if the words are wrong.

    Args:
        usage: shown if there are no words.
        help: returns the text for ``--help``, given the words after it, or ``--help-all``.
        plan: checks the run file and the other words, and returns the plan.
        run: runs the plan. Its arguments are the plan, the words without ``--traceback``, and whether that was given.
    """
    if not words:
        print(usage, file=sys.stderr)
        return WRONG_INPUT
    kept = [word for word in words if word != "--traceback"]
    try:
        help_index = next((index for index, word in enumerate(words) if word in HELP_WORDS), None)
        if help_index is not None:
            print(help([HELP_ALL] if words[help_index] == HELP_ALL else words[help_index + 1 :]))
            return 0
        checked_plan = plan(*split_words(kept))
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    print_version_warning()
    return run(checked_plan, kept, "--traceback" in words)


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split off the run file: the first word, or the word after ``--config``. Returns it and the remaining words.

    Raises:
        UsageError: two files are given, or no file follows ``--config``.
    """
    files, rest = [], list(words)
    if rest and not rest[0].startswith("-"):
        files.append(rest.pop(0))
    while (index := next((i for i, word in enumerate(rest) if word.partition("=")[0] == CONFIG), None)) is not None:
        _, equals, value = rest.pop(index).partition("=")
        if not equals:
            value = rest.pop(index) if index < len(rest) and not rest[index].startswith("--") else ""
        if not value:
            raise UsageError([f"{COMMAND_LINE}: `{CONFIG}` needs the name of a run file: {CONFIG} run.yaml"])
        files.append(value)
    if len(files) > 1:
        raise UsageError([f"{COMMAND_LINE}: there are two run files, {' and '.join(files)}. Give one of them."])
    return (Path(os.path.expanduser(files[0])) if files else None), rest


def print_version_warning() -> None:
    """Warn of untested package versions. To be called before heavy imports, which such a version may break."""
    warning = versions.warning()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
