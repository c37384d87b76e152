"""Killed with -9: at random moments, and at every operation of a save."""

from __future__ import annotations

import random
import signal

from faults.harness import Either, Fault, Killed, Resumes, Survived, Writes
from faults.runs import Running

SAVES = dict(max_steps=6, save_steps=2)
KILLED = Resumes(Killed(signal.SIGKILL))
KILLED_OR_DONE = Resumes(Either(Killed(signal.SIGKILL), Survived()))


def killed_after(part: float):
    """All ranks, after this part of the time that the run takes."""

    def kill(running: Running) -> None:
        running.wait_until(part * running.whole_seconds)
        running.kill()

    return kill


def at_random_moments(processes: int) -> list[Fault]:
    moments = random.Random(processes)
    return [
        Fault(
            "kill",
            f"random moment {number} of {processes} process{'es' * (processes > 1)}",
            KILLED_OR_DONE,
            options=SAVES,
            outside=killed_after(moments.uniform(0.2, 1.0)),
            processes=processes,
            quick=number <= 20,
        )
        for number in range(1, 41)
    ]


def at_every_write(processes: int, parts: int, rank: int = 0, **options) -> list[Fault]:
    return [
        Fault(
            "kill",
            f"{what[5:]} write {part} and every {parts}th after it, rank {rank} of {processes}",
            KILLED_OR_DONE,
            options=dict(max_steps=4, save_steps=2, **options),
            writes=Writes(what, part, parts, rank=rank),
            processes=processes,
            limit=30.0,
            quick=what == "kill within" and (processes == 1 or part == 1),
        )
        for what in ("kill within", "kill before")
        for part in range(1, parts + 1)
    ]


FAULTS = [
    *at_random_moments(1),
    *at_random_moments(2),
    *at_every_write(1, 6),
    *at_every_write(2, 6),
    *at_every_write(2, 2, rank=1),
]
