"""Ranks of a worker, forked from one process that has imported what they need.

``python -m support.ranks NUMBER WORKER WORDS...`` runs the worker as torchrun does. Torchrun would import torch for
itself, and all the rest once for each rank: most of the time of a short test.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path

from support.processes import free_port

RANKS = [sys.executable, "-m", "support.ranks", "2"]
"""The beginning of a command for two ranks, in `processes.environment`."""
MODULES = (
    "online_dpo.training.trainer",
    "support.training",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
)


def main() -> None:
    """Starts the ranks and waits for all; when one fails, the others are killed. Returns in each rank as well."""
    number, worker = int(sys.argv[1]), sys.argv[2]
    import torch

    torch.set_num_threads(1)
    for name in (*MODULES, *(["deepspeed"] if "DS_ACCELERATOR" in os.environ else [])):
        import_module(name)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    shared = dict(WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1")
    shared["MASTER_PORT"] = str(free_port())
    running: dict[int, int] = {}
    for rank in range(number):
        pid = os.fork()
        if not pid:
            # torch makes its pool anew after a fork: here, before two threads do so at once, which fails
            torch.set_num_threads(1)
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv, sys.path[0] = sys.argv[2:], str(Path(worker).parent)
            runpy.run_path(worker, run_name="__main__")
            return
        running[pid] = rank
    while running:
        pid, status = os.wait()
        rank, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"Rank {rank} has ended with code {code}.")


if __name__ == "__main__":
    main()
