"""How many processes were started together, as the programs that start them say in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

SLURM = "SLURM_STEP_NUM_TASKS"
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", SLURM)
"""Set by torchrun and accelerate, by three kinds of MPI, and by srun."""


@dataclass(frozen=True)
class Started:
    """``count`` processes, of which this is one; ``variable`` says so.

    >>> Started(2, "WORLD_SIZE")
    """

    count: int
    variable: str


def started_together() -> Started | None:
    """``None`` where this process is alone."""
    for variable in SIZES:
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return Started(int(count), variable) if int(count) > 1 else None
    return None


def why_not_alone(command: str) -> str | None:
    """What is wrong with several processes for a command that runs in one; ``None`` where this is the only one."""
    started = started_together()
    if started is None:
        return None
    return (
        f"{started.count} processes were started ({started.variable}), and each of them would do all the work of "
        f"`{command}`, which runs in one. {start_alone(started)}"
    )


def start_alone(started: Started) -> str:
    """What to do where each process is meant to work for itself."""
    return f"Start it without torchrun, mpirun or srun, or with the variable {started.variable} unset."
