"""What happens to files before a run begins; each is a ``prepare`` of a fault, or a part of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path], None]


def all_of(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def stopped_after(step: int, *then: Change) -> Change:
    """The output folder is as if the run had been killed behind this checkpoint; then come other changes."""

    def stop(folder: Path) -> None:
        out = folder / "out"
        for path in out.iterdir():
            if path.is_file():
                path.unlink()
            elif not path.name.startswith("checkpoint-") or int(path.name.partition("-")[2]) > step:
                shutil.rmtree(path)

    return all_of(stop, *then)


def removed(name: str) -> Change:
    """A file, or a folder with all that is in it, is gone."""

    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(name: str, data: str | bytes) -> Change:
    """A file holds other data."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return write


def emptied(name: str) -> Change:
    return written(name, b"")


def cut_in_half(name: str) -> Change:
    """A file ends in the middle."""

    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def flipped(name: str, where: float = 0.5) -> Change:
    """One bit of a file is another, at this part of its length."""

    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        (folder / name).write_bytes(data)

    return flip


def zeroed(name: str) -> Change:
    """The second half of a file is zeros, as some file systems leave it after a loss of power."""

    def zero(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))

    return zero
