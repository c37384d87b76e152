"""Printing of lines, which are wrapped on a terminal and left unchanged elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, TextIO

from online_dpo.errors import printable


def print_lines(lines: Iterable[str], indent: int = 4, stream: TextIO | None = None) -> None:
    """Print lines. On a terminal, a line that does not fit continues ``indent`` columns from the left.

    Long words, such as paths, are not broken.
    """
    out: TextIO = sys.stdout if stream is None else stream
    for line in map(printable, lines):
        print(wrapped(line, indent) if out.isatty() else line, file=out, flush=True)


def wrapped(line: str, indent: int, width: int | None = None) -> str:
    """Wrap a line between words; following lines are indented.

    >>> wrapped("  model   a path that is long", indent=10, width=20)
    '  model   a path\\n          that is\\n          long'
    """
    width = shutil.get_terminal_size().columns if width is None else width
    keep_words: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, max(width, indent + 20), subsequent_indent=" " * indent, **keep_words)
