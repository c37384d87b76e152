"""Files that only grow at their end, by whole pieces: a row or a frame, each in one `os.write`.

A piece that could not be written stays in memory and is written before the next one, so that a disk which is full for a
while costs nothing. What a killed process leaves is whole but for its last piece.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from pathlib import Path

LARGEST_BACKLOG = 256 << 20
"""Bytes that wait in memory for a disk, at most. Beyond them, the oldest pieces are dropped, and counted."""


class GrowingFile:
    """One file to whose end pieces are written.

    ``backlog`` holds what could not be written yet, ``dropped`` counts the pieces that had to go from it. ``size`` is
    the number of bytes of the file.

    Args:
        path: the file, which is made if it is not there. It must not be a link.
        shared: other processes write to its end as well, so that nothing may be cut off.
        opens: at once, or else with the first piece.
    """

    def __init__(self, path: Path, shared: bool = False, opens: bool = True) -> None:
        self.path, self._shared = path, shared
        self.backlog: deque[bytes] = deque()
        self.dropped = self.size = 0
        self._descriptor: int | None = None
        if opens:
            self._open()

    def _open(self) -> int:
        """Opens the file, and closes the one before only then: what is closed may be the number of another file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no file", str(self.path))
        self.close()
        self._descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        self._torn = self._shared and self.size > 0 and not _ends_a_line(self.path)
        return descriptor

    def add(self, piece: bytes) -> None:
        """Writes a piece, after those that wait.

        Raises:
            OSError: it could not be written yet; it waits.
        """
        self.backlog.append(piece)
        if len(self.backlog) > 1 and sum(map(len, self.backlog)) > LARGEST_BACKLOG:
            self.backlog.popleft()
            self.dropped += 1
        self.flush()

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: not all of it could be written.
        """
        while self.backlog:
            descriptor = self._opened()
            piece = self.backlog.popleft()  # before it is written: what a signal raises after it must not double it
            try:
                self._write(descriptor, piece)
            except OSError:
                self.backlog.appendleft(piece)
                raise

    def _opened(self) -> int:
        """The descriptor of the file, which is opened if it is not yet, or if somebody has removed it."""
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink:
            return self._descriptor
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self._open()

    def _write(self, descriptor: int, piece: bytes) -> None:
        """Writes one piece whole. What is there of one that does not fit goes before the next try."""
        if self._torn and self._shared:  # the part of a piece that stands there becomes a line of its own
            piece = b"\n" + piece
        elif self._torn:
            os.ftruncate(descriptor, self.size)
        written = os.write(descriptor, piece)
        self._torn = written < len(piece)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.size += written

    def sync(self) -> None:
        """Brings everything to the disk.

        Raises:
            OSError: that was not possible.
        """
        self.flush()
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file, once. What waits is lost."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
