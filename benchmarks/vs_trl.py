"""One optimizer step of Online DPO: this library against TRL's trainer, on the same weights, prompts and lengths.

    python benchmarks/vs_trl.py --workload chat long-prompt --json result.json

Two processes, one a trainer, make one step each in turn: one step to warm up, one in which memory is measured, then
``--repetitions`` steps that are timed. TRL runs at its best: without gradient checkpointing, so with its KV cache on.
On a GPU both processes keep their models and caches on it, so two trainings have to fit.
Ratios are TRL over ours for seconds (above 1: ours is faster) and ours over TRL for memory (below 1: ours needs less).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from measure import PHASES, describe_machine, limit_share, summarise, useful_gflop, versions
from worker import Worker, WorkerFailed
from workloads import KINDS, MODELS, MOST_STEPS, make_workload

WARM_UP_STEPS = 1
STEPS_BEFORE_TIMING = WARM_UP_STEPS + 1  # the second one is for memory
SPEED_UPS = ("step", "non_generation", *PHASES)
SIDES = ("ours", "trl")


def refuse(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parser_with_shared_options(description: str | None, default_workloads: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workload", nargs="+", choices=list(KINDS), default=default_workloads, metavar="NAME", help=", ".join(KINDS))
    add("--model", choices=list(MODELS), default="small", metavar="NAME", help=f"{', '.join(MODELS)} (default: small)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: mixed precision")
    add("--repetitions", type=int, default=5, metavar="N", help="timed steps (default: 5)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def check_shared_options(options: argparse.Namespace) -> None:
    """Ends the program with status 2 and one line where an option cannot be met."""
    if not 1 <= options.repetitions <= MOST_STEPS - STEPS_BEFORE_TIMING:
        refuse(f"--repetitions must be between 1 and {MOST_STEPS - STEPS_BEFORE_TIMING}")
    if options.threads < 1:
        refuse("--threads must be at least 1")
    if options.json is not None:
        folder = options.json.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or options.json.is_dir():
            refuse(f"--json {options.json}: cannot be written; its folder must exist and be writable")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            refuse("--device cuda: torch finds no CUDA device here")


def header(options: argparse.Namespace, matrix_rate_gflops: float) -> dict[str, Any]:
    """What a reader of the figures has to know about the run."""
    return {
        "device": describe_machine(options.device, options.threads),
        "versions": versions(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "model": options.model,
        "dtype": options.dtype,
        "repetitions": options.repetitions,
        "matrix_rate_gflops": matrix_rate_gflops,
    }


def step_gflop(model: str, workload: str, step: dict[str, Any], passes: int = 3) -> float:
    """GFLOP that a worker's step needed after sampling; see `measure.useful_gflop`."""
    shape = MODELS[model]
    prompts = make_workload(workload, shape.vocabulary, MOST_STEPS).prompts
    return useful_gflop(shape, [len(prompts[row]) for row in step["rows"]], step["lengths"], step["trained"], passes)


def run_in_turn(workers: list[Worker], repetitions: int) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Each worker's memory step, and each worker's timed steps. All must have met the same prompts."""
    plan = ["time"] * WARM_UP_STEPS + ["memory"] + ["time"] * repetitions
    done: list[list[dict[str, Any]]] = [[] for _ in workers]
    for number, word in enumerate(plan):
        print(f"  step {number + 1} of {len(plan)}", file=sys.stderr)
        for worker, steps in zip(workers, done, strict=True):
            steps.append(worker.ask(word))
        assert len({tuple(steps[-1]["rows"]) for steps in done}) == 1, "the trainers have met different prompts"
    return [steps[WARM_UP_STEPS] for steps in done], [steps[STEPS_BEFORE_TIMING:] for steps in done]


def compare(model: str, workload: str, workers: dict[str, Worker], repetitions: int, rate: float) -> dict[str, Any]:
    """The figures of one workload, as they stand in the JSON file."""
    memory_steps, timed = run_in_turn([workers[side] for side in SIDES], repetitions)
    memory = {side: step["memory"] for side, step in zip(SIDES, memory_steps, strict=True)}
    seconds = {side: [step["seconds"] for step in steps] for side, steps in zip(SIDES, timed, strict=True)}
    useful = {
        side: [step_gflop(model, workload, step) for step in steps] for side, steps in zip(SIDES, timed, strict=True)
    }
    summary = {side: summarise(seconds[side]) for side in SIDES}
    ours, trl = (summary[side] for side in SIDES)

    def ratio(part: str) -> float | None:
        return memory["ours"][part] / memory["trl"][part] if memory["trl"][part] else None

    return {
        "speedup": {p: trl[p]["median"] / ours[p]["median"] for p in SPEED_UPS if p in ours and p in trl},
        "memory_ratio": ratio("step"),
        "memory_ratio_non_generation": ratio("non_generation"),
        "ours": ours,
        "trl": trl,
        "peak_mib": {side: memory[side]["step"] for side in SIDES},
        "peak_mib_generation": {side: memory[side]["generation"] for side in SIDES},
        "peak_mib_non_generation": {side: memory[side]["non_generation"] for side in SIDES},
        "baseline_mib": {side: memory[side]["baseline"] for side in SIDES},
        "useful_gflop": median(useful["ours"]),
        "useful_gflop_trl": median(useful["trl"]),  # differs where ours samples more than two completions
        "limit_share": {side: limit_share(useful[side], seconds[side], rate) for side in SIDES},
    }


def print_comparison(name: str, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "TRL", "ours", "TRL / ours", "TRL min..max", "ours min..max", title=f"{name}: seconds a step")
    for column in table.columns[1:]:
        column.justify = "right"

    def spread(phase: dict[str, float] | None) -> str:
        return f"{phase['min']:.3f}..{phase['max']:.3f}" if phase else "-"

    for phase in (*PHASES, "other", "non_generation", "step"):
        trl, ours = figures["trl"].get(phase), figures["ours"].get(phase)
        medians = [f"{side['median']:.3f}" if side else "-" for side in (trl, ours)]
        speedup = f"{trl['median'] / ours['median']:.2f}" if trl and ours else "-"
        table.add_row(phase.replace("_", " "), *medians, speedup, spread(trl), spread(ours))
    console = Console(width=100, highlight=False)
    console.print(table)
    for title, key in (
        ("whole step", "peak_mib"),
        ("sampling", "peak_mib_generation"),
        ("rest", "peak_mib_non_generation"),
    ):
        trl, ours = figures[key]["trl"], figures[key]["ours"]
        ratio = f"  ours / TRL {ours / trl:.2f}" if trl else ""
        console.print(f"  peak memory above the models, {title}: TRL {trl:.0f} MiB, ours {ours:.0f} MiB{ratio}")
    share = figures["limit_share"]
    console.print(
        f"  useful work after sampling: {figures['useful_gflop']:.2f} GFLOP (TRL {figures['useful_gflop_trl']:.2f}); "
        f"share of the machine's matrix rate: TRL {share['trl']:.1%}, ours {share['ours']:.1%}\n",
        soft_wrap=True,
    )


def main() -> None:
    parser = parser_with_shared_options(__doc__, list(KINDS))
    parser.add_argument(
        "--trl-cache", choices=["dynamic", "static"], default="dynamic", help="KV cache of TRL's sampling"
    )
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        refuse("trl is not installed: pip install 'online-dpo[bench]'")
    check_shared_options(options)
    from trainers import Job

    rate, results = 0.0, {}
    for name in options.workload:
        print(f"{name}: building models", file=sys.stderr)
        jobs = [
            Job(
                side=side,
                workload=name,
                model=options.model,
                device=options.device,
                dtype=options.dtype,
                threads=options.threads,
                steps=STEPS_BEFORE_TIMING + options.repetitions,
                trl_cache=options.trl_cache,
            )
            for side in SIDES
        ]
        with Worker(jobs[0]) as ours, Worker(jobs[1]) as trl:
            for worker in (ours, trl):
                worker.ready()
            rate = rate or ours.ask("rate")["gflops"]
            results[name] = compare(options.model, name, {"ours": ours, "trl": trl}, options.repetitions, rate)
        print_comparison(name, results[name])
        if options.json is not None:  # after each workload: a long run that breaks off leaves what it has measured
            options.json.write_text(json.dumps({**header(options, rate), "workloads": results}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except WorkerFailed as failure:
        print(f"{Path(sys.argv[0]).name}: error: {failure}", file=sys.stderr)
        raise SystemExit(1) from None
