"""The record of a run (docs/reference/run-folder) that is damaged, gone or not ours: no run fails because of it."""

from __future__ import annotations

from faults.damage import (
    Change,
    all_of,
    cut_in_half,
    emptied,
    flipped,
    lengthened,
    removed,
    stopped_after,
    written,
    zeroed,
)
from faults.harness import RESUME, Fault, OneLine, Survived

DAMAGES = {
    "is missing": removed,
    "is empty": emptied,
    "is cut in half": cut_in_half,
    "has a flipped bit": flipped,
    "ends in zeros": zeroed,
    "is too long": lengthened,
}
FILES = ("metrics.jsonl", "events.jsonl", "environment.json", "completions-r0-*", "run.yaml")
QUICK = ("is cut in half", "ends in zeros")


def resumed(name: str, change: Change, quick: bool = True) -> Fault:
    """Resumed after step 2, with a record that goes to step 4."""
    return Fault(
        "record",
        f"{name}, resumed",
        Survived(),
        options=dict(save_steps=2),
        trained={},
        prepare=stopped_after(2, change),
        words=RESUME,
        quick=quick,
    )


def a_folder(name: str) -> Change:
    return all_of(removed(name), lambda folder: (folder / name).mkdir())


def a_link(name: str) -> Change:
    return all_of(removed(name), lambda folder: (folder / name).symlink_to(folder / "data.jsonl"))


FAULTS = [
    *(
        resumed(f"{file} {how}", damage(f"out/{file}"), how in QUICK)
        for file in FILES
        for how, damage in DAMAGES.items()
    ),
    *(resumed(f"{file} is a folder", a_folder(f"out/{file}")) for file in ("metrics.jsonl", "events.jsonl")),
    *(resumed(f"{file} is a link", a_link(f"out/{file}")) for file in ("metrics.jsonl", "events.jsonl")),
    Fault(
        "record",
        "metrics.jsonl of another program",
        Survived("no run folder is written", "out/metrics.jsonl"),
        prepare=written("out/metrics.jsonl", "step,loss\n"),
    ),
    Fault(
        "record",
        "metrics.jsonl of another program where a run folder is asked for",
        OneLine(2, "out/metrics.jsonl", "run_folder"),
        options=dict(run_folder=True),
        prepare=written("out/metrics.jsonl", "step,loss\n"),
    ),
    Fault(
        "record",
        "no run folder, resumed with one",
        Survived(),
        options=dict(save_steps=2),
        trained=dict(run_folder=False),
        prepare=stopped_after(2),
        words=RESUME,
    ),
]
