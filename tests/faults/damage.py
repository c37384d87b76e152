"""What happens to files before a run begins; each is a ``prepare`` of a fault, or a part of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from online_dpo.runs.layout import RECORD_PATTERNS

Change = Callable[[Path], None]


def all_of(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def stopped_after(step: int, *then: Change) -> Change:
    """The output folder is as if the run had been killed behind this checkpoint; then come other changes. The record
    of the run is there, also of the steps after it.
    """

    def stop(folder: Path) -> None:
        out = folder / "out"
        for path in out.iterdir():
            if any(path.match(pattern) for pattern in RECORD_PATTERNS):
                continue
            if path.is_file():
                path.unlink()
            elif not path.name.startswith("checkpoint-") or int(path.name.partition("-")[2]) > step:
                shutil.rmtree(path)

    return all_of(stop, *then)


def every(pattern: str, change_file: Callable[[Path], None]) -> Change:
    """Something is done to each file, or folder, that a pattern finds; there is one at least."""

    def change(folder: Path) -> None:
        paths = list(folder.glob(pattern))
        assert paths, f"there is no {pattern}"
        for path in paths:
            change_file(path)

    return change


def removed(pattern: str) -> Change:
    """A file, or a folder with all that is in it, is gone."""
    return every(pattern, lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink())


def written(name: str, data: str | bytes) -> Change:
    """A file holds other data, or is there now."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return write


def edited(pattern: str, edit: Callable[[bytes], bytes]) -> Change:
    return every(pattern, lambda path: path.write_bytes(edit(path.read_bytes())) and None)


def edited_json(pattern: str, edit: Callable[[dict], object]) -> Change:
    """A file of JSON is changed in place."""

    def change(data: bytes) -> bytes:
        values = json.loads(data)
        edit(values)
        return json.dumps(values).encode()

    return edited(pattern, change)


def edited_tensors(pattern: str, edit: Callable[[dict], object]) -> Change:
    """A file of tensors is changed in place."""

    def change(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return every(pattern, change)


def emptied(pattern: str) -> Change:
    return edited(pattern, lambda data: b"")


def cut_in_half(pattern: str) -> Change:
    """A file ends in the middle."""
    return edited(pattern, lambda data: data[: len(data) // 2])


def lengthened(pattern: str) -> Change:
    """A file has more at its end."""
    return edited(pattern, lambda data: data + b"\0" * 64)


def flipped(pattern: str, where: float = 0.5) -> Change:
    """One bit of a file is another, at this part of its length."""

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(where * (len(changed) - 1))] ^= 1
        return bytes(changed)

    return edited(pattern, flip)


def zeroed(pattern: str) -> Change:
    """The second half of a file is zeros, as some file systems leave it after a loss of power."""
    return edited(pattern, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
