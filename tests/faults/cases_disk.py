"""Disks that are full, fail or cannot be written to."""

from __future__ import annotations

import errno

from faults.damage import Change, all_of, written
from faults.harness import Either, Fault, OneLine, Resumes, Survived, WriteFault, Writes

FAILS = Resumes(Either(OneLine(1, "out"), Survived()))
SAVES = dict(max_steps=4, save_steps=2)
PARTS = 40


def at_writes(name: str, what: WriteFault, error: int, quick: int, processes: int = 1) -> list[Fault]:
    return [
        Fault(
            "disk",
            f"{name} at write {part} and every {PARTS}th after it, {processes} process{'es' * (processes > 1)}",
            FAILS,
            options=SAVES,
            writes=Writes(what, part, PARTS, error=error),
            processes=processes,
            limit=30.0,
            quick=part == quick,
        )
        for part in range(1, PARTS + 1)
    ]


def a_link(name: str, to: str) -> Change:
    return lambda folder: (folder / name).symlink_to(to)


FAULTS = [
    *at_writes("the disk is full", "fail from there", errno.ENOSPC, quick=3),
    *at_writes("the disk is full", "fail from there", errno.ENOSPC, quick=9, processes=2),
    *at_writes("the quota is used up", "fail from there", errno.EDQUOT, quick=25),
    *at_writes("the disk fails once", "fail once", errno.EIO, quick=33),
    Fault("disk", "the output folder is a file", OneLine(2, "out"), prepare=written("out", "x")),
    Fault(
        "disk", "the output folder is below a file", OneLine(2, "data.jsonl"), options=dict(output_dir="data.jsonl/out")
    ),
    Fault(
        "disk", "the output folder is a link to nothing", OneLine(2, "out"), prepare=a_link("out", "/nowhere/at/all")
    ),
    Fault("disk", "the output folder is /proc", OneLine(2, "/proc"), options=dict(output_dir="/proc/out")),
    Fault(
        "disk",
        "the output folder is a link to another folder",
        Survived(),
        prepare=all_of(lambda folder: (folder / "elsewhere").mkdir(), a_link("out", "elsewhere")),
    ),
    Fault("disk", "a name that is too long", OneLine(2, "output_dir"), options=dict(output_dir="o" * 300)),
]
