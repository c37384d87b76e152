"""The memory that `online_dpo.sizing` predicts for steps on a card, against the peaks of the processes that train.

python -m gpu_parts.memory --model qwen2.5-0.5b --device cuda --json FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import MIB
from memory_estimate import plan_fields
from vs_trl import STEPS_BEFORE_TIMING, run_in_turn
from worker import Worker
from workloads import MODELS

from gpu_parts.record import table, write_tables

VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "gradient-checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
}


def estimated(workload: str, model: str, device: str, variant: dict[str, bool]) -> float:
    """MiB of the fullest moment by the formula, without what the allocator loses."""
    from online_dpo.sizing.needs import LIBRARIES, memory_needs
    from online_dpo.sizing.plan import Plan

    job = {"workload": workload, "model": model, "way": "one process", "lora": False, "gradient_checkpointing": False}
    on_cpu = device == "cpu"
    fields = plan_fields(job | variant, most_tokens=1024 if on_cpu else 16384)
    needs = memory_needs(Plan(**(fields | {"on_cpu": on_cpu, "bf16": True, "reward_model_bytes": 2})))
    return (needs.process + LIBRARIES if on_cpu else needs.gpu) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workload", nargs="+", default=["chat", "long-answer"])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--limit", type=float, help="seconds of each run")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    import torch
    from trainers import Job

    rows: list[list[Any]] = []
    failures: list[str] = []
    for workload, variant in ((w, v) for w in options.workload for v in options.variant):
        threads, steps, fields = torch.get_num_threads(), STEPS_BEFORE_TIMING, VARIANTS[variant]
        job = Job("ours", workload, options.model, options.device, "bfloat16", threads, steps, **fields)
        with Worker(job, options.limit) as worker:
            measured = run_in_turn({variant: worker}, 0)[0][variant]
        if measured.failure is not None:
            failures.append(f"{workload}, {variant}: {measured.failure}")
        else:
            expected = estimated(workload, options.model, options.device, VARIANTS[variant])
            peak, reserved = measured.memory["allocated"], measured.memory["reserved"]
            rows.append([workload, variant, expected, peak, reserved, expected / peak, expected / reserved])
            print(*rows[-1], flush=True)
        columns = ["workload", "variant", "estimated, MiB", "allocated", "reserved", "/ allocated", "/ reserved"]
        write_tables(options.json, [table(f"Memory of a step, {options.model}", columns, rows, *failures)])
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
