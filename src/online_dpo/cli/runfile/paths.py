"""Checks of paths in a run file and on the command line. Nothing heavy may be imported here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")

MAX_NAME_BYTES = 255
"""Length of one name in a path that file systems take."""
MAX_PATH_BYTES = 4095


def path_problem(text: str) -> str | None:
    """What is wrong with the text of a path or a name on the hub, or nothing. The message continues ``the field ...``.

    >>> path_problem("data.jsonl ")
    "is 'data.jsonl ': there is white space at an end, or a line break in it. Remove it."
    """
    if not text.strip():
        return "is empty."
    if text != text.strip() or len(text.splitlines()) > 1:
        return f"is {text!r}: there is white space at an end, or a line break in it. Remove it."
    encoded = os.fsencode(text)
    if len(encoded) > MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        return f"is {text[:40] + '...'!r}: {len(encoded)} bytes are too long for a file system."
    return None


def output_problem(text: str, inputs: Iterable[tuple[str, str]]) -> str | None:
    """What is wrong with the path of a folder that is to be written, or nothing.

    Args:
        inputs: fields and paths of what is read, which must not be overwritten.
    """
    if problem := path_problem(text):
        return f"{problem} Give the name of a folder, new or old."
    if "$" in text:
        return f"is {text!r}: environment variables are not filled in here. Give it on the command line."
    folder = Path(os.path.expanduser(text))
    if folder.exists() and not folder.is_dir():
        return "is a file. Give the name of a folder, new or old."
    if folder.resolve() == Path(folder.resolve().anchor):
        return "is the root of the file system. Give the name of a folder, new or old."
    for name, path in inputs:
        if path_problem(path) is None and Path(path).is_dir() and folder.resolve() == Path(path).resolve():
            return f"is the folder of `{name}`, whose files the run would replace. Give another one."
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        return f"cannot be made: {above} is a file."
    if not os.access(above, os.W_OK | os.X_OK) or os.statvfs(above).f_flag & os.ST_RDONLY:
        return f"cannot be written: nothing may be written in {above}."
    return None


def exists(path: Path) -> bool:
    """Whether there is a file or folder of that name, which may have the signs of a pattern in it, or a match."""
    return path.exists() or bool(glob.glob(str(path), recursive=True))


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths are of one file that exists."""
    return first.exists() and second.exists() and os.path.samefile(first, second)


def looks_like_path(text: str) -> bool:
    """Whether a text can only be a path on this disk: names on the hub are ``name`` or ``owner/name``."""
    is_file = text.removesuffix(".gz").endswith(DATA_SUFFIXES)
    return is_file or text.startswith(("/", "./", "../", "~")) or text.endswith("/") or text.count("/") > 1
