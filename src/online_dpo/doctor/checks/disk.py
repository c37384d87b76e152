"""Free space of the disk against what the run writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, gib, ok, problem, warning
from online_dpo.doctor.registry import check

FP32, MOMENTS = 4, 8
BYTES_A_TOKEN = 20
"""Of the record of completions, at most: the token's text and its log-ratio, compressed."""
SPARE = 1.2
"""So much of the need should be free: logs, and other things that use the disk."""


@check("disk")
def disk(case: Case) -> Iterator[Finding]:
    """Checkpoints, as many as are kept, one more that is being written, and the model at the end."""
    args = case.args
    model, each = checkpoint_bytes(case)
    kept = checkpoints_kept(case)
    record = record_bytes(case)
    needed = model + each * kept + record
    folder = existing(Path(str(args.output_dir)).absolute())
    free = psutil.disk_usage(str(folder)).free
    facts: dict[str, Any] = {"free": free, "needed": needed, "checkpoint": each, "checkpoints": kept}
    what = f"{kept} checkpoint(s) of {gib(each)}, the model of {gib(model)}, its record of up to {gib(record)}"
    found = f"{gib(free)} are free in {folder}; the run writes {gib(needed)}: {what}"
    change = "Free space, choose another `output_dir`, or lower `save_total_limit` or set `save_only_model: true`."
    if free < needed:
        yield problem(found, change, **facts)
    elif free < SPARE * needed:
        yield warning(found, change, **facts)
    else:
        yield ok(found, **facts)


def existing(path: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(one for one in (path, *path.parents) if one.exists())


def checkpoint_bytes(case: Case) -> tuple[int, int]:
    """Returns the bytes of the saved model, and of a checkpoint with the optimizer's state."""
    trained = trained_numbers(case)
    model = FP32 * trained
    return model, model + (0 if case.args.save_only_model else MOMENTS * trained)


def record_bytes(case: Case) -> int:
    """Returns the most bytes of the record of completions in the run folder."""
    args = case.args
    if args.run_folder is False or args.log_completions == "off":
        return 0
    tokens = (case.steps or 0) * case.prompts_per_step * args.num_completions * args.max_new_tokens
    return min(args.log_completions_max_mb * 10**6, BYTES_A_TOKEN * tokens)


def trained_numbers(case: Case) -> int:
    """Returns how many numbers are trained: all, or those of an adapter of rank r on all linear layers, which has
    about (inputs + outputs) * r for each.
    """
    if not case.subject.lora_rank:
        return case.counts.parameters
    return case.subject.lora_rank * case.counts.linear_edges


def checkpoints_kept(case: Case) -> int:
    """Returns the most checkpoints that lie on the disk at a time; the oldest goes after the newest is written."""
    args, steps = case.args, case.steps
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no" or steps is None:
        return 0
    if strategy == "epoch":
        saved = math.ceil(args.num_train_epochs)
    else:
        every = args.save_steps if args.save_steps >= 1 else max(1, round(steps * args.save_steps))
        saved = math.ceil(steps / every)
    return saved if args.save_total_limit is None else min(saved, args.save_total_limit + 1)
