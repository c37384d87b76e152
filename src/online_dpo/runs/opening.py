"""Opens files of a run folder for reading, which somebody else may have written: only regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a link, a pipe or a device: those could lead anywhere, or never end.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, most: int) -> bytes:
    """The content of a file of at most so many bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return content
