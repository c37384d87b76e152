"""Files that are whole or absent: written aside, brought to the disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields another path to write to. At the end, what was written takes the place of ``path``, which was whole until
    then; after an error ``path`` stays as it was.
    """
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)  # of a killed process; a link of somebody else's is not followed
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a folder with all that is in it, or a file. Of a link, only the link goes, not what it leads to.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Deletes what is there, if anything is and if it can be (see `delete`)."""
    with suppress(OSError):
        delete(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is whole or as it was before, whenever the process is killed."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def synced_digest(path: Path) -> str:
    """Brings a file to the disk and returns its SHA-256. It is read first, while it is still in memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def digest(path: Path) -> str:
    """The SHA-256 of a file. A file that has not changed since this process has read it is not read again."""
    status = path.stat()
    return _digest(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, *status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
