"""One optimizer step of Online DPO: this library against TRL's trainer, on the same weights, prompts and lengths.

    python benchmarks/vs_trl.py --workload chat long-prompt --json result.json

Each trainer is a process of its own, which makes one step to warm up, one in which memory is measured, then
``--repetitions`` steps that are timed. On a CPU they make one step each in turn, so that all meet the same ups and
downs of the machine. On a GPU, where two trainings may not fit, one ends before the next begins (``--order``). Either
way all start with the same weights, and meet the same prompts and completion lengths, which is checked.

TRL runs at its best: without gradient checkpointing, so with its KV cache on. ``--trl-cache dynamic static`` measures
it with both kinds of cache. Where a trainer fails, that is told, and the figures of the others stand.
Ratios are TRL over ours for seconds (above 1: ours is faster) and ours over TRL for memory (below 1: ours needs less).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

from measure import PHASES, describe_machine, limit_share, summarise, useful_gflop, versions
from worker import Worker, WorkerFailed
from workloads import KINDS, MODELS, MOST_PROMPTS, MOST_STEPS, PROMPTS_PER_STEP, make_workload

if TYPE_CHECKING:
    from trainers import Job

WARM_UP_STEPS = 1
STEPS_BEFORE_TIMING = WARM_UP_STEPS + 1  # the second one is for memory
SPEED_UPS = ("step", "non_generation", *PHASES)
PLAN = ["time"] * WARM_UP_STEPS + ["memory"]
"""What a worker is asked for before the timed steps."""
OURS = "ours"
IN_TURN, ONE_AFTER_THE_OTHER = "in-turn", "one-after-the-other"
MOST_FREED_LATE = 2048
"""MiB of a card that may be in use when a trainer begins, above what was when the first one began."""


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
    add("--prompts", type=int, default=PROMPTS_PER_STEP, metavar="N", help=f"of a step (default: {PROMPTS_PER_STEP})")
    add("--repetitions", type=int, default=5, metavar="N", help="timed steps (default: 5)")
    add("--limit", type=float, metavar="SECONDS", help="a trainer that takes longer for a workload is killed")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def check_shared_options(options: argparse.Namespace) -> None:
    """Ends the program with status 2 and one line where an option cannot be met."""
    if not 1 <= options.repetitions <= MOST_STEPS - STEPS_BEFORE_TIMING:
        refuse(f"--repetitions must be between 1 and {MOST_STEPS - STEPS_BEFORE_TIMING}")
    most_prompts = MOST_PROMPTS // (STEPS_BEFORE_TIMING + options.repetitions)
    if not 1 <= options.prompts <= most_prompts:
        refuse(f"--prompts must be between 1 and {most_prompts}: there are {MOST_PROMPTS} for all steps")
    if options.limit is not None and options.limit <= 0:
        refuse("--limit must be above 0")
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
        "prompts": options.prompts,
        "repetitions": options.repetitions,
        "matrix_rate_gflops": matrix_rate_gflops,
    }


def step_gflop(model: str, workload: str, step: dict[str, Any], passes: int = 3) -> float:
    """GFLOP that a worker's step needed after sampling; see `measure.useful_gflop`."""
    shape = MODELS[model]
    prompts = make_workload(workload, shape.vocabulary, MOST_STEPS).prompts  # all that there can be
    return useful_gflop(shape, [len(prompts[row]) for row in step["rows"]], step["lengths"], step["trained"], passes)


@dataclass
class Measured:
    """What one trainer has done, step by step, or why it has failed."""

    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def memory(self) -> dict[str, float]:
        """The figures of the step in which memory was measured."""
        return self.steps[WARM_UP_STEPS]["memory"]

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The steps whose time was measured."""
        return self.steps[STEPS_BEFORE_TIMING:]

    @property
    def seconds(self) -> list[dict[str, float]]:
        """Seconds by phase of each timed step."""
        return [step["seconds"] for step in self.timed]


def attempt(measured: Measured, action: Any, *args: Any) -> Any:
    """The action's result, or ``None`` after the worker has failed, which is then noted."""
    if measured.failure is not None:
        return None
    try:
        return action(*args)
    except WorkerFailed as failure:
        print(f"  {failure}", file=sys.stderr)
        measured.failure = str(failure)
        return None


def run_in_turn(workers: dict[str, Worker], repetitions: int) -> tuple[dict[str, Measured], float]:
    """What each worker has done in steps that they made in turn, and the machine's matrix rate (0: unknown)."""
    measured, rate = {side: Measured() for side in workers}, 0.0
    for side, worker in workers.items():
        measured[side].facts = attempt(measured[side], worker.ready) or {}
    for side, worker in workers.items():
        rate = rate or (attempt(measured[side], worker.ask, "rate") or {}).get("gflops", 0.0)
    plan = [*PLAN, *["time"] * repetitions]
    for number, word in enumerate(plan):
        print(f"  step {number + 1} of {len(plan)}", file=sys.stderr)
        for side, worker in workers.items():
            step = attempt(measured[side], worker.ask, word)
            if step is not None:
                measured[side].steps.append(step)
    return measured, rate


def run_sides(
    jobs: dict[str, Job], repetitions: int, order: str, limit: float | None = None
) -> Iterator[tuple[dict[str, Measured], float]]:
    """Yields what the sides have done so far, and the machine's matrix rate (0: unknown): once for all that make their
    steps in turn, and after each where one ends before the next begins.
    """
    if order == IN_TURN:
        with ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(job, limit)) for side, job in jobs.items()}
            measured, rate = run_in_turn(workers, repetitions)
        check_same_work(measured)
        yield measured, rate
        return
    measured, rate = {}, 0.0
    for side, job in jobs.items():
        print(f" {side}", file=sys.stderr)
        with Worker(job, limit) as worker:  # at whose end the process has gone, with all that it held
            done, own_rate = run_in_turn({side: worker}, repetitions)
        measured, rate = measured | done, rate or own_rate
        check_same_work(measured)
        yield measured, rate


def check_same_work(measured: dict[str, Measured]) -> None:
    """Warns of a card that was not free; what is measured counts only if the work was the same.

    Raises:
        AssertionError: two sides had other weights, prompts or completion lengths.
    """
    sides = [side for side in measured.values() if side.facts]
    for one, other in zip(sides, sides[1:], strict=False):
        assert one.facts["weights"] == other.facts["weights"], "the trainers have started with different weights"
        if other.facts["used_mib"] > sides[0].facts["used_mib"] + MOST_FREED_LATE:
            print(f"  warning: {other.facts['used_mib']:.0f} MiB of the card were in use at a start", file=sys.stderr)
        for mine, yours in zip(one.steps, other.steps, strict=False):
            assert mine["rows"] == yours["rows"], "the trainers have met different prompts"
            pairs = zip(mine["lengths"], yours["lengths"], strict=True)
            assert all(a[:2] == b[:2] for a, b in pairs), "the trainers have sampled completions of different lengths"


def compare(
    model: str, workload: str, measured: dict[str, Measured], trl: str, repetitions: int, rate: float
) -> dict[str, Any]:
    """The figures of one workload, ours against one variant of TRL, as they stand in the JSON file. A side that has
    failed has its last lines under ``failed``, and no figures.
    """
    sides = {name: measured[side] for name, side in (("ours", OURS), ("trl", trl)) if side in measured}
    failed = {name: side.failure for name, side in sides.items() if side.failure is not None}
    whole = {name: side for name, side in sides.items() if len(side.steps) == STEPS_BEFORE_TIMING + repetitions}
    figures: dict[str, Any] = {"failed": failed} if failed else {}
    useful = {name: [step_gflop(model, workload, step) for step in side.timed] for name, side in whole.items()}
    figures |= {name: summarise(side.seconds) for name, side in whole.items()}
    if len(whole) == 2:
        figures |= ratios(figures["ours"], figures["trl"], whole["ours"].memory, whole["trl"].memory)

    def memory(part: str) -> dict[str, float]:
        return {name: side.memory[part] for name, side in whole.items()}

    return figures | {
        "peak_mib": memory("step"),
        "peak_mib_generation": memory("generation"),
        "peak_mib_non_generation": memory("non_generation"),
        "baseline_mib": memory("baseline"),
        "allocated_mib": memory("allocated"),
        "reserved_mib": memory("reserved"),
        "useful_gflop": median(useful["ours"]) if "ours" in useful else None,
        # differs where ours samples more than two completions
        "useful_gflop_trl": median(useful["trl"]) if "trl" in useful else None,
        "limit_share": {name: limit_share(useful[name], side.seconds, rate) for name, side in whole.items()},
    }


def ratios(
    ours: dict[str, Any], trl: dict[str, Any], our_memory: dict[str, float], trl_memory: dict[str, float]
) -> dict[str, Any]:
    """Ours against TRL: seconds by phase and memory."""

    def ratio(part: str) -> float | None:
        return our_memory[part] / trl_memory[part] if trl_memory[part] else None

    return {
        "speedup": {p: trl[p]["median"] / ours[p]["median"] for p in SPEED_UPS if p in ours and p in trl},
        "memory_ratio": ratio("step"),
        "memory_ratio_non_generation": ratio("non_generation"),
        "reserved_ratio": ratio("reserved"),
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
        trl, ours = figures.get("trl", {}).get(phase), figures.get("ours", {}).get(phase)
        medians = [f"{side['median']:.3f}" if side else "-" for side in (trl, ours)]
        speedup = f"{trl['median'] / ours['median']:.2f}" if trl and ours else "-"
        table.add_row(phase.replace("_", " "), *medians, speedup, spread(trl), spread(ours))
    console = Console(width=100, highlight=False)
    console.print(table)
    for title, key in (
        ("above the models, whole step", "peak_mib"),
        ("above the models, sampling", "peak_mib_generation"),
        ("above the models, rest", "peak_mib_non_generation"),
        ("with the models", "allocated_mib"),
        ("with the models, reserved", "reserved_mib"),
    ):
        trl, ours = figures[key].get("trl"), figures[key].get("ours")
        ratio = f"  ours / TRL {ours / trl:.2f}" if trl and ours is not None else ""
        sides = [f"{name} {'-' if mib is None else f'{mib:.0f} MiB'}" for name, mib in (("TRL", trl), ("ours", ours))]
        console.print(f"  peak memory {title}: {', '.join(sides)}{ratio}")
    names = {"ours": ("ours", "useful_gflop"), "trl": ("TRL", "useful_gflop_trl")}
    work = ", ".join(f"{names[side][0]} {figures[names[side][1]]:.2f}" for side in figures["limit_share"])
    shares = ", ".join(f"{names[side][0]} {share:.1%}" for side, share in figures["limit_share"].items())
    console.print(
        f"  useful work after sampling, GFLOP: {work}; share of the machine's matrix rate: {shares}", soft_wrap=True
    )
    for side, failure in figures.get("failed", {}).items():
        console.print(f"  {names[side][0]} has failed: {failure}", soft_wrap=True, markup=False)
    console.print()


def main() -> None:
    parser = parser_with_shared_options(__doc__, list(KINDS))
    parser.add_argument(
        "--trl-cache",
        nargs="+",
        choices=["dynamic", "static"],
        default=["dynamic"],
        metavar="KIND",
        help="KV cache of TRL's sampling, dynamic (its default) or static or both: each is measured",
    )
    parser.add_argument(
        "--order",
        choices=[IN_TURN, ONE_AFTER_THE_OTHER],
        help="of the trainers' steps (default: in-turn on a CPU, one-after-the-other on a GPU)",
    )
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        refuse("trl is not installed: pip install 'online-dpo[bench]'")
    check_shared_options(options)
    options.order = options.order or (IN_TURN if options.device == "cpu" else ONE_AFTER_THE_OTHER)
    from trainers import Job

    rate, results, failures = 0.0, {}, 0
    for name in options.workload:
        print(f"{name}: building models", file=sys.stderr)
        shared = dict(
            workload=name,
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            steps=STEPS_BEFORE_TIMING + options.repetitions,
            prompts=options.prompts,
        )
        caches = {f"trl, {cache}": Job(side="trl", trl_cache=cache, **shared) for cache in options.trl_cache}
        titles = [name, *(f"{name}, TRL with a {cache} cache" for cache in options.trl_cache[1:])]
        jobs, measured = {OURS: Job(side="ours", **shared), **caches}, {}
        for measured, new_rate in run_sides(jobs, options.repetitions, options.order, options.limit):
            rate = rate or new_rate
            for title, trl in zip(titles, caches, strict=True):
                results[title] = compare(options.model, name, measured, trl, options.repetitions, rate)
            if options.json is not None:  # each time: a long run that breaks off leaves what it has measured
                options.json.write_text(json.dumps({**header(options, rate), "workloads": results}, indent=1) + "\n")
        failures += sum(side.failure is not None for side in measured.values())
        for title in titles:
            print_comparison(title, results[title])
    if failures:
        print(f"{Path(sys.argv[0]).name}: error: {failures} of the trainers' runs failed; see above", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
