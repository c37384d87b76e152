"""Many tiny steps in one process: memory, threads, open files and child processes stay as they are.

    python -m faults.soak --steps 10000

It trains twice half of the steps, without and with lookahead, with checkpoints, their rotation and evaluations now and
then, prints what the process had along the way, and fails if anything grew by more than the limits.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
from transformers import PrinterCallback, TrainerCallback

MOST_GROWTH = 1000.0
"""KB per 1,000 steps. The log takes about 100 with an entry each 50 steps, and is kept until the run ends. The rest is
what the allocator of C spreads over more pages: Python's objects stay equally many.
"""
POINTS = 20
"""Measurements in each half."""
WARM_UP = 0.3
"""This part of the measurements comes before all caches are full."""


@dataclass(frozen=True)
class Point:
    step: int
    seconds: float
    memory: float
    """KB of the process that are in memory."""
    threads: int
    files: int
    children: int


def measure(step: int, began: float) -> Point:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = list(Path("/proc/self/task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1024
    files = len(os.listdir("/proc/self/fd"))
    return Point(step, time.perf_counter() - began, memory, len(tasks), files, children)


class Meter(TrainerCallback):
    """Measures ``POINTS`` times in a run."""

    def __init__(self, steps: int) -> None:
        self.points: list[Point] = []
        self._every = max(steps // POINTS, 1)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self.points.append(measure(state.global_step, self._began))


def soak(folder: Path, steps: int, max_staleness: int) -> list[Point]:
    """Trains a tiny model and returns what was measured."""
    from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from support import tiny, training

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    meter = Meter(steps)
    args = OnlineDPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=steps,
        max_staleness=max_staleness,
        logging_steps=50,
        save_steps=max(steps // 25, 10),
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=max(steps // 10, 20),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-4,
        max_new_tokens=4,
        max_length=32,
        gradient_checkpointing=False,
        max_idle_steps=None,
    )
    trainer = OnlineDPOTrainer(
        model=tiny.causal_lm("llama", sharpness=1.0, num_key_value_heads=1, **shape),
        reward_funcs=training.word_reward,
        args=args,
        train_dataset=training.dataset(),
        eval_dataset=training.dataset((3, 4)),
        processing_class=tiny.tokenizer(),
        callbacks=[meter],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return meter.points


def growth(points: list[Point]) -> float:
    """KB per 1,000 steps after the warm-up, by least squares."""
    warm = points[int(WARM_UP * len(points)) :]
    steps = [point.step / 1000 for point in warm]
    memory = [point.memory for point in warm]
    middle, mean = sum(steps) / len(steps), sum(memory) / len(memory)
    over = sum((step - middle) ** 2 for step in steps)
    return sum((s - middle) * (m - mean) for s, m in zip(steps, memory, strict=True)) / over


def problems(points: list[Point], most_growth: float) -> list[str]:
    """What grew."""
    warm = points[int(WARM_UP * len(points)) :]
    found = []
    if (slope := growth(points)) > most_growth:
        found.append(f"memory grows by {slope:.0f} KB per 1,000 steps; at most {most_growth:.0f}")
    for name in ("threads", "files", "children"):
        first, last = getattr(warm[0], name), max(getattr(point, name) for point in warm)
        if last > first:
            found.append(f"{name}: {first} became {last}")
    return found


def table(points: list[Point]) -> str:
    head = f"{'step':>7}{'seconds':>9}{'memory MB':>11}{'threads':>9}{'files':>7}{'children':>10}"
    rows = [
        f"{p.step:>7}{p.seconds:>9.1f}{p.memory / 1024:>11.1f}{p.threads:>9}{p.files:>7}{p.children:>10}"
        for p in points[:: max(len(points) // 10, 1)]
    ]
    return "\n".join([head, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--most-growth", type=float, default=MOST_GROWTH, help="KB per 1,000 steps")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for staleness, name in ((0, "without lookahead"), (1, "with lookahead")):
        with tempfile.TemporaryDirectory() as folder:
            points = soak(Path(folder), asked.steps // 2, staleness)
        found = problems(points, asked.most_growth)
        print(f"{name}: memory grows by {growth(points):.0f} KB per 1,000 steps\n{table(points)}", flush=True)
        failed += [f"{name}: {problem}" for problem in found]
    print("\n".join(failed) or "Nothing grew beyond its limit.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
