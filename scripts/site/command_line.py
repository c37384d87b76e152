"""Writes docs/reference/command-line.md from what the commands themselves print: python scripts/site/command_line.py"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

os.environ.update(COLUMNS="100", NO_COLOR="1")

from online_dpo.cli.main import COMMANDS, main  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs/reference/command-line.md"
HEAD = """# Command line

<!-- Made from the commands' own help by `make pages`: change it there. -->

Every command of `online-dpo`, with what `online-dpo COMMAND --help` prints. 
The fields of a run stand in [Configuration](configuration.md).

| exit code | meaning |
|---:|---|
| 0 | success: for a training, a finite model that was trained |
| 1 | the run failed |
| 2 | wrong input: a word, a file or a value |
| 3 | nothing was trained |
| 128 + n | stopped by signal n (130: Ctrl-C) |
"""


def command_line_page() -> str:
    """The page as it has to be today."""
    parts = [HEAD, section("online-dpo", [])]
    parts += [section(f"online-dpo {name}", [name]) for name in COMMANDS]
    return "\n".join(parts)


def section(title: str, words: list[str]) -> str:
    return f"## {title}\n\n```text\n{help_text(words)}\n```\n"


def help_text(words: list[str]) -> str:
    """What a command prints when it is asked for help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


if __name__ == "__main__":
    PAGE.write_text(command_line_page(), encoding="utf-8")
