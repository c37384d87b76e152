"""The number of processes that were started together, from the environment variables of launchers."""

from __future__ import annotations

import os
from dataclasses import dataclass

SLURM = "SLURM_STEP_NUM_TASKS"
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", SLURM)
"""The variables of torchrun and accelerate, of three MPI implementations, and of srun."""


@dataclass(frozen=True)
class Started:
    """A launch of ``count`` processes, of which this is one, according to the environment variable ``variable``.

    >>> Started(2, "WORLD_SIZE")
    """

    count: int
    variable: str


def started_together() -> Started | None:
    """The launch that this process belongs to; ``None`` if this is the only process."""
    for variable in SIZES:
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return Started(int(count), variable) if int(count) > 1 else None
    return None


def why_not_alone(command: str) -> str | None:
    """The error message for a command that runs in one process but was started in several; ``None`` if it was not."""
    started = started_together()
    if started is None:
        return None
    return (
        f"{started.count} processes were started ({started.variable}), and each of them would do all the work of "
        f"`{command}`, which runs in one process. {start_alone(started)}"
    )


def start_alone(started: Started) -> str:
    """The advice for an error message: how to start a single process."""
    return f"Start it without torchrun, mpirun or srun, or with the variable {started.variable} unset."
