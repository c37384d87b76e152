"""Cuts the record of a run off after a step, so that a run which is resumed from there has every row once.

A damaged piece in the middle of a file is left where it is, since readers pass over it; what follows it is judged by
its own step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.files import replacing
from online_dpo.runs.frames import MAGIC, Frame, frames, read
from online_dpo.runs.layout import EVENTS, METRICS, completions_files

SUMMARY = "train_runtime"
"""A metric of the last log of a run. It belongs to no step, and a run that goes on has another one at its end."""


@dataclass
class Cut:
    """What has been cut off, and what was found.

    >>> Cut(rows=2, frames=3, damaged=["completions-r0-00000.jsonl.zst"])
    """

    rows: int = 0
    frames: int = 0
    damaged: list[str] = field(default_factory=list)
    last_logged: int = 0


def cut_after(folder: Path, step: int) -> Cut:
    """Cuts off rows of metrics and frames of completions of later steps, of all ranks, and what is torn.

    Raises:
        OSError: a file cannot be read or cut.
    """
    cut = Cut()
    _end_torn_line(folder / EVENTS)
    _cut_metrics(folder / METRICS, step, cut)
    files = completions_files(folder)
    for rank in sorted({file.rank for file in files}):
        for file in reversed([file for file in files if file.rank == rank]):
            if _cut_completions(folder / file.name, step, cut):
                break  # the files before it are of earlier steps
    return cut


def _end_torn_line(path: Path) -> None:
    """Cuts off what stands after the last line of a file, if anything does."""
    if path.is_file():
        content = path.read_bytes()
        _truncate(path, content.rfind(b"\n") + 1)


def _cut_metrics(path: Path, step: int, cut: Cut) -> None:
    """Later rows stand at the end; but a summary may stand before rows of an epoch's end, so that rows are chosen."""
    if not path.is_file():
        return
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    kept = []
    for line in lines:
        row = _object(line)
        if row is None:
            kept.append(line)
            cut.damaged += [path.name] * (path.name not in cut.damaged and bool(line))
        elif _step(row) > step or SUMMARY in row:
            cut.rows += 1
        else:
            kept.append(line)
            cut.last_logged = _step(row)
    new = b"".join(line + b"\n" for line in kept)
    if content.startswith(new):
        _truncate(path, len(new))
    else:
        _replace(path, new)


def _cut_completions(path: Path, step: int, cut: Cut) -> bool:
    """Cuts a file after its last frame of a step that stays; returns whether there is one, else the file goes.

    A rank has one frame for a step, and steps ascend. What is damaged at the very end is torn.
    """
    later, end = 0, 0
    pieces = list(_pieces(path))
    for place, (frame, is_frame) in reversed(list(enumerate(pieces))):
        number = _step_of(path, frame) if is_frame else None
        if number is None and place == len(pieces) - 1:
            continue
        if number is not None and number > step:
            later += 1
            continue
        end = frame.end
        if number is None or not all(whole for _, whole in pieces[:place]):
            cut.damaged.append(path.name)
        break
    cut.frames += later
    if end:
        _truncate(path, end)
    else:
        path.unlink()
    return bool(end)


def _step_of(path: Path, frame: Frame) -> int | None:
    """The step of a frame; ``None`` if it is damaged."""
    try:
        return max(_step(row) for row in read(path, frame))
    except (ValueError, TypeError, AttributeError):
        return None


def _pieces(path: Path) -> Iterator[tuple[Frame, bool]]:
    """The frames of a file in their order, and with ``False`` what stands between them or at the end and is none."""
    content = path.read_bytes()
    start = 0
    while start < len(content):
        for frame in frames(path, start):
            yield frame, True
            start = frame.end
        if start < len(content):
            following = content.find(MAGIC.to_bytes(4, "little"), start + 1)
            end = len(content) if following < 0 else following
            yield Frame(start, end), False
            start = end


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step(row: dict[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _truncate(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        os.truncate(path, size)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as aside:
        aside.write_bytes(content)
