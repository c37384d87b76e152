"""Files of JSON lines to which several processes append: the trainer's ranks, and dashboards."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.runs.reading import read_lines


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as lines of strict JSON."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return lines.encode("utf-8", "replace")  # a text may hold half of a surrogate pair


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows as lines, and bring them to the disk. One process at a time writes; what a killed one has left
    unfinished becomes a line of its own, which readers leave out.

    Raises:
        OSError: they cannot be written. Then none of them is there.
    """
    content = jsonl(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        _append(descriptor, content)
    finally:
        os.close(descriptor)  # which unlocks it


def _append(descriptor: int, content: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        content = b"\n" + content
    try:
        written = os.write(descriptor, content)
        if written < len(content):
            raise OSError(f"the disk took {written} of {len(content)} bytes")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


class FollowedLines:
    """The rows of a file that grows, read further at each look.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0

    def further(self) -> list[dict[str, Any]]:
        """The rows since the last look; all of them where the file has become shorter."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < self._end:
            self._end = 0
        if size == self._end:
            return []
        lines = read_lines(self.path, self._end)
        self._end = lines.end
        return lines.rows
