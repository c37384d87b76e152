"""What the run folder costs: its share of a step of the workload `chat`, and of the quickstart.

    python benchmarks/recording.py --model small --steps 10 --quickstart-steps 20

Time is CPU time, of the thread that trains for the record and of the whole process for the step, so that another load
on the machine changes little; the share of wall time is given beside it. What is counted as the record: what the ledger
keeps of each pass, the groups of the step as JSON, their compression and writing, rows of metrics (one a step) and
events, and bringing all of it to the disk before a checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTED = {
    "online_dpo.training.recording:Recording": ("on_step_end", "on_log", "on_evaluate", "on_save", "save"),
    "online_dpo.training.ledger:Ledger": ("begin_step", "saw_pass"),
}
"""Methods of the record that are called while a run trains; they do not call each other."""


class Costs:
    """CPU and wall seconds of the record, and of the steps that it is written for."""

    def __init__(self) -> None:
        self.record_cpu = self.record_wall = 0.0
        self.step_cpu: list[float] = []
        self.step_wall: list[float] = []
        self.shares: list[tuple[float, float]] = []
        self._before = (0.0, 0.0, 0.0, 0.0)

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, whose time is added up."""

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.record_cpu += time.thread_time() - cpu
                self.record_wall += time.perf_counter() - wall

        return timed

    def end_step(self) -> None:
        """Takes what has been counted since the last call for a step."""
        now = (time.process_time(), time.perf_counter(), self.record_cpu, self.record_wall)
        step_cpu, step_wall, record_cpu, record_wall = (a - b for a, b in zip(now, self._before, strict=True))
        if self._before[0]:
            self.step_cpu.append(step_cpu)
            self.step_wall.append(step_wall)
            self.shares.append((record_cpu / step_cpu, record_wall / step_wall))
        self._before = now

    def summary(self, folder: Path) -> dict[str, Any]:
        """The figures of a run that has written into a folder."""
        cpu, wall = sum(self.step_cpu), sum(self.step_wall)
        record = [share * step for (share, _), step in zip(self.shares, self.step_cpu, strict=True)]
        record_wall = [share * step for (_, share), step in zip(self.shares, self.step_wall, strict=True)]
        sizes = [path.stat().st_size for path in folder.glob("completions-*")]
        return {
            "steps": len(self.step_cpu),
            "step_ms": 1000 * wall / len(self.step_wall),
            "record_ms": 1000 * sum(record) / len(record),
            "share_of_cpu": sum(record) / cpu,
            "share_of_wall": sum(record_wall) / wall,
            "bytes_a_step": sum(sizes) / (len(self.step_cpu) + 1),
        }


def count(costs: Costs) -> None:
    """Has the methods of the record counted, in this process."""
    from importlib import import_module

    for place, names in COUNTED.items():
        module, name = place.split(":")
        cls = getattr(import_module(module), name)
        for method in names:
            setattr(cls, method, costs.counted(getattr(cls, method)))


def step_timer(costs: Costs) -> Any:
    """A callback that is called last at the beginning of each step, after the logs and saves of the one before."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            costs.end_step()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            costs.end_step()

    return StepTimer()


def chat(model: str, steps: int, threads: int) -> dict[str, Any]:
    """The workload `chat` of `workloads.py`."""
    import torch
    from trainers import Job, Probe, build

    torch.set_num_threads(threads)
    costs = Costs()
    count(costs)
    with tempfile.TemporaryDirectory() as folder:
        job = Job("ours", "chat", model, "cpu", "float32", threads, steps + 1)
        probe = Probe("cpu")
        trainer = build(job, folder, probe)
        trainer.args.run_folder, trainer.args.logging_steps = True, 1
        trainer.state.logging_steps = 1
        trainer.add_callback(step_timer(costs))
        probe.start(memory=False)
        trainer.train()
        return costs.summary(Path(folder))


def quickstart(steps: int) -> dict[str, Any]:
    """The quickstart, which writes a run folder itself."""
    from rich.console import Console

    from online_dpo.quickstart.run import run_quickstart

    costs = Costs()
    count(costs)
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        run_quickstart(Path(folder), max_steps=steps, console=quiet, callbacks=[step_timer(costs)])
        return costs.summary(Path(folder))


def main() -> None:
    """Measures and prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="of workloads.py")
    parser.add_argument("--steps", type=int, default=10, help="steps of the workload chat; 0: none")
    parser.add_argument("--quickstart-steps", type=int, default=0, help="steps of the quickstart; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    figures = {}
    if given.steps:
        figures["chat"] = chat(given.model, given.steps, given.threads)
    if given.quickstart_steps:
        figures["quickstart"] = quickstart(given.quickstart_steps)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
