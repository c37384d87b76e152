"""One optimizer step of this library alone, under different options: where its time and memory go.

    python benchmarks/step.py --workload chat --variant plain lora --optim adamw_torch_fused sgd

Each row is a worker process of its own, with the same steps as in `vs_trl.py`: one to warm up, one for memory, then the
timed ones. Memory is in MiB above what the process held with its models loaded and no optimizer state yet.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from measure import PHASES, limit_share, summarise
from vs_trl import (
    STEPS_BEFORE_TIMING,
    Measured,
    check_shared_options,
    header,
    parser_with_shared_options,
    refuse,
    run_in_turn,
    step_gflop,
)
from worker import Worker

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-completion-a-row": {"fields": {"share_prompts": False}},
    "gradient-checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "lora-gradient-checkpointing": {"lora": True, "gradient_checkpointing": True},
    "flex-attention": {"fields": {"flex_attention": True}},
    "sdpa": {"fields": {"flex_attention": False}},
}
"""Fields of `trainers.Job` that each variant sets."""

ON_A_GPU = ("flex-attention", "sdpa")
"""Variants that differ from the plain one on a GPU only."""

DEFAULT_OPTIMIZER = "adamw_torch_fused"


def row_name(variant: str, optim: str, optims: list[str]) -> str:
    """The optimizer is named where there are several."""
    return variant if len(optims) == 1 else f"{variant} {optim}"


def figures_of(job: Any, measured: Measured, rate: float) -> dict[str, Any]:
    """The figures of one row, as they stand in the JSON file."""
    memory, seconds, models_mib = measured.memory, measured.seconds, measured.facts["models_mib"]
    passes = 2 if job.lora else 3
    useful = [step_gflop(job.model, job.workload, step, passes) for step in measured.timed]
    kept_mib = memory["baseline"] - models_mib  # what the first step has left behind: optimizer state, mostly
    return {
        "variant": {"gradient_checkpointing": job.gradient_checkpointing, "lora": job.lora, "optim": job.optim},
        "seconds": summarise(seconds),
        "models_mib": models_mib,
        "kept_mib": kept_mib,
        "peak_mib": memory["step"] + kept_mib,
        "peak_mib_generation": memory["generation"] + kept_mib,
        "peak_mib_non_generation": memory["non_generation"] + kept_mib,
        "allocated_mib": memory["allocated"],
        "reserved_mib": memory["reserved"],
        "useful_gflop": median(useful),
        "limit_share": limit_share(useful, seconds, rate),
    }


def print_rows(workload: str, rows: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{workload}: seconds a step, MiB above the models")
    table.add_column("", no_wrap=True)
    phases = (*PHASES, "other", "step")
    sizes = {"models": "models_mib", "state": "kept_mib", "peak sampling": "peak_mib_generation", "peak": "peak_mib"}
    for title in (*phases, *sizes, "limit share"):
        table.add_column(title.replace("_", " "), justify="right")
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, "failed")
            continue
        seconds = [row["seconds"].get(phase) for phase in phases]
        table.add_row(
            name,
            *(f"{phase['median']:.3f}" if phase else "-" for phase in seconds),
            *(f"{row[key]:.0f}" for key in sizes.values()),
            f"{row['limit_share']:.1%}",
        )
    console = Console(width=170, highlight=False)
    console.print(table)
    console.print(
        "  models: MiB held before the first step. state: what that step leaves behind, mostly the optimizer's.\n"
        "  limit share: useful work after sampling over what the machine's matrix rate allows in that time.\n"
    )


def main() -> None:
    parser = parser_with_shared_options(__doc__, ["chat"])
    add = parser.add_argument
    names = ", ".join(VARIANTS)
    add("--variant", nargs="+", choices=list(VARIANTS), metavar="NAME", help=f"{names} (default: all that there are)")
    add("--optim", nargs="+", default=[DEFAULT_OPTIMIZER], metavar="NAME", help="as TrainingArguments' `optim`")
    options = parser.parse_args()
    on_cpu = [name for name in VARIANTS if name not in ON_A_GPU]
    options.variant = options.variant or (on_cpu if options.device == "cpu" else list(VARIANTS))
    if options.device == "cpu" and (elsewhere := set(options.variant) - set(on_cpu)):
        refuse(f"--variant {min(elsewhere)}: it differs from the plain one on a GPU only")
    if importlib.util.find_spec("peft") is None and any(VARIANTS[name].get("lora") for name in options.variant):
        refuse("peft is not installed: pip install 'online-dpo[peft]', or choose variants without lora")
    check_shared_options(options)
    from transformers.training_args import OptimizerNames

    unknown = [name for name in options.optim if name not in {known.value for known in OptimizerNames}]
    if unknown:
        refuse(f"--optim {unknown[0]}: transformers has no such optimizer")
    from trainers import Job

    rate, results, failures = 0.0, {}, 0
    for workload in options.workload:
        rows: dict[str, dict[str, Any]] = {}
        for variant, optim in ((v, o) for v in options.variant for o in options.optim):
            name = row_name(variant, optim, options.optim)
            print(f"{workload}, {name}", file=sys.stderr)
            job = Job(
                side="ours",
                workload=workload,
                model=options.model,
                device=options.device,
                dtype=options.dtype,
                threads=options.threads,
                steps=STEPS_BEFORE_TIMING + options.repetitions,
                prompts=options.prompts,
                optim=optim,
                **VARIANTS[variant],
            )
            with Worker(job, options.limit) as worker:
                measured, own_rate = run_in_turn({name: worker}, options.repetitions)
            rate, failure = rate or own_rate, measured[name].failure
            rows[name] = {"failed": failure} if failure else figures_of(job, measured[name], rate)
            failures += failure is not None
            results[workload] = rows
            if options.json is not None:
                options.json.write_text(json.dumps({**header(options, rate), "workloads": results}, indent=1) + "\n")
        print_rows(workload, rows)
    if failures:
        print(f"{Path(sys.argv[0]).name}: error: {failures} rows failed; see above", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
