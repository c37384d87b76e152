"""Lines for people: on a terminal broken between words, elsewhere as they are."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, TextIO


def say(lines: Iterable[str], indent: int = 4, stream: TextIO | None = None) -> None:
    """Print lines. What does not fit in a terminal goes on ``indent`` columns from the left; long words, such as paths,
    stay whole.
    """
    out: TextIO = sys.stdout if stream is None else stream
    for line in lines:
        print(fitted(line, indent) if out.isatty() else line, file=out, flush=True)


def fitted(line: str, indent: int, width: int | None = None) -> str:
    """
    >>> fitted("  model   a path that is long", indent=10, width=20)
    '  model   a path\\n          that is\\n          long'
    """
    width = shutil.get_terminal_size().columns if width is None else width
    whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, max(width, indent + 20), subsequent_indent=" " * indent, **whole)
