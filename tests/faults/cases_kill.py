"""Killed with -9: at random moments, and at every operation of a save."""

from __future__ import annotations

import random
import signal

from faults.harness import Either, Fault, Killed, Resumes, Survived, WriteFault, Writes
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


def at_random_moments(processes: int, seed: int) -> list[Fault]:
    moments = random.Random(seed)
    return [
        Fault(
            "kill",
            f"random moment {number} of seed {seed}, {processes} process{'es' * (processes > 1)}",
            KILLED_OR_DONE,
            options=SAVES,
            outside=killed_after(moments.uniform(0.2, 1.0)),
            processes=processes,
            limit=30.0,
            quick=number <= 20 // processes,
        )
        for number in range(1, 41)
    ]


def at_every_write(what: WriteFault, processes: int, parts: int, quick: tuple[int, ...], rank: int = 0) -> list[Fault]:
    return [
        Fault(
            "kill",
            f"{what[5:]} write {part} and every {parts}th after it, rank {rank} of {processes}",
            KILLED_OR_DONE,
            options=dict(max_steps=4, save_steps=2),
            writes=Writes(what, part, parts, rank=rank),
            processes=processes,
            limit=30.0,
            quick=part in quick,
        )
        for part in range(1, parts + 1)
    ]


FAULTS = [
    *at_random_moments(1, seed=1),
    *at_random_moments(2, seed=2),
    # one that is killed within an operation which is no write has done it: as if it were killed before the next one
    *at_every_write("kill within", 1, parts=40, quick=(5,)),
    *at_every_write("kill within", 2, parts=40, quick=(11,)),
    *at_every_write("kill within", 2, parts=2, quick=(1,), rank=1),
    *at_every_write("kill before", 1, parts=40, quick=()),
]
