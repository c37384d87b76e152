"""The start of several processes: they come together within `ddp_timeout`, or end with one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from online_dpo.distributed.processes import started_together
from online_dpo.errors import RankLostError, error_text

ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_on_cpu(backend: str | None, limit: float) -> None:
    """Makes the process group of processes that train on CPUs, where a launcher has said how.

    transformers would make it without its `ddp_timeout` there.

    Args:
        backend: the configured one (``ddp_backend``).
        limit: seconds that a collective operation may take, and the start.
    """
    known = backend in (None, "gloo") and not dist.is_mpi_available() and all(name in os.environ for name in ADDRESS)
    if known and started_together() is not None and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=limit))


@contextmanager
def coming_together(limit: float) -> Iterator[None]:
    """Inside, processes that were started together make a process group.

    Raises:
        RankLostError: not all of them came, or they cannot reach each other.
    """
    started = started_together()
    try:
        yield
    except dist.DistError as error:  # pyright: ignore[reportPrivateImportUsage]
        count = "The" if started is None else f"The {started.count}"
        raise RankLostError(
            f"{count} processes of this run did not come together within `ddp_timeout`, {limit:g} seconds: "
            f"{error_text(error, first_line=True).rstrip('.')}. Start all of them with the same MASTER_ADDR and "
            "MASTER_PORT, or raise `ddp_timeout`."
        ) from error
