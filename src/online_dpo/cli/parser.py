"""An argument parser that reports an error in one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NoReturn

from online_dpo.config.names_elsewhere import hint_for

WRONG_INPUT = 2  # the exit code of every command when its words or its files are wrong


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that prints errors without the usage, suggests the nearest name, and accepts no abbreviations.

    Args:
        called_here: names of options in other tools, and the names of the same options here.
        unknown: hint for an option without a similar name, as a sentence with a leading space.
    """

    def __init__(self, *, called_here: Mapping[str, str] | None = None, unknown: str = "", **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # pyright: ignore[reportArgumentType]
        self._called_here = called_here or {}
        self._unknown = unknown

    def error(self, message: str) -> NoReturn:
        """Print an error with a hint, and exit with code 2."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = ""
        if message.startswith("unrecognized arguments") and unknown.startswith("--"):
            options = [option[2:].replace("-", "_") for option in self._option_string_actions if option[:2] == "--"]
            hint = hint_for(unknown[2:].partition("=")[0], options, self._called_here) or self._unknown
            hint = hint.replace("_", "-") if hint.startswith((" Here it is", " Did you mean")) else hint
        self.exit(2, f"error: {message}.{hint} See: {self.prog} --help\n")


def with_hyphens(words: list[str]) -> list[str]:
    """Replace underscores in the names of options, which ``train`` and ``eval`` also accept: ``--base_url``."""

    def hyphenated(word: str) -> str:
        name, equals, value = word.partition("=")
        return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word

    return [hyphenated(word) for word in words]
