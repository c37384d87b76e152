"""Step time and cost of N trainer and M sampling GPUs, from the phase times of runs that were measured.

    python benchmarks/scale.py --run 1,1,0:out/checkpoint-20/trainer_state.json --completions 4 --gpus 8 16 --price 2.5

A ``--run`` is trainers,servers,max_staleness and a run's log; 0 servers means that trainers sample themselves. From one
run, what a phase takes is divided by the number of processes that share it; from runs with other numbers (as many as
there are), the part that does not divide is found as well (Amdahl). `scale_check.py` holds predictions against runs.

The model. Sampling is shared by the servers, or by the trainers where there are none; training and scoring by the
trainers; sending weights is done once for all servers, with a part for each. What is left of a step (fetching,
pairing, the optimizer's end, logs) is the same for any number. With ``max_staleness`` 0 all of it happens in turn. With
more, the next step is sampled while one is trained: a step takes as long as the longer of the two, and what nothing
runs beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PHASES = ("rollout", "scoring", "training", "sync")
GB = 1e9


@dataclass(frozen=True)
class Run:
    """Mean seconds of a step by phase, ``all`` among them, with so many trainers and servers; completions of a step."""

    trainers: int
    servers: int
    staleness: int
    seconds: dict[str, float]
    prompts: float

    @property
    def other(self) -> float:
        """What no phase accounts for, in a run without overlap."""
        return max(0.0, self.seconds["all"] - sum(self.seconds[phase] for phase in PHASES))


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase that ``n`` processes share: ``fixed + divided / n + each * n``.

    >>> Phase(fixed=1.0, divided=8.0).seconds(4)
    3.0
    """

    fixed: float = 0.0
    divided: float = 0.0
    each: float = 0.0

    def seconds(self, n: float) -> float:
        return self.fixed + self.divided / n + self.each * n


@dataclass(frozen=True)
class Traffic:
    """What trainers exchange in a step: gradients of so many bytes, and with sharded weights these as well.

    A ring sends 2 (n - 1) / n times the gradients; ZeRO-3 and FSDP2 gather weights twice and reduce gradients once,
    3 (n - 1) / n (Rajbhandari et al. 2020, section 7). Several passes in a step gather as many times.
    """

    gradient_bytes: float = 0.0
    bytes_per_second: float = 1.0
    sharded: bool = False
    passes: int = 1

    def seconds(self, n: int) -> float:
        times = 1 + 2 * self.passes if self.sharded else 2
        return times * (n - 1) / n * self.gradient_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Step:
    """The phases of a step, and how many completions it samples."""

    rollout: Phase
    scoring: Phase
    training: Phase
    sync: Phase
    other: Phase
    completions: float
    traffic: Traffic = Traffic()

    def seconds(self, trainers: int, servers: int, staleness: int = 0, cores: int | None = None) -> float:
        """Predicts the seconds of a step.

        Args:
            servers: 0 where trainers sample themselves: then nothing overlaps.
            cores: on a CPU, the cores that all processes share, each of which uses one.
        """
        at_most = cores or max(trainers, servers)
        training = self.training.seconds(min(trainers, at_most)) + self.traffic.seconds(trainers)
        training += self.other.seconds(1)
        scoring = self.scoring.seconds(min(trainers, at_most))
        if not servers:
            return self.rollout.seconds(min(trainers, at_most)) + scoring + self.sync.seconds(1) + training
        rollout, sync = self.rollout.seconds(min(servers, at_most)), self.sync.seconds(servers)
        if not staleness:
            return rollout + scoring + sync + training
        # `Lookahead`: sampling begins when weights are there. One thread a step ahead: the first also scores before it
        # samples again, beside the weights being sent.
        beside = max(rollout, training)
        if cores:
            busy = min(trainers, cores) * training + min(servers, cores) * rollout
            beside = max(beside, busy / cores)
        if staleness == 1:
            return max(sync, scoring) + beside
        return max(sync + beside, (rollout + scoring + sync) / staleness)


def fit(points: Sequence[tuple[int, float]], by: str = "divided") -> Phase:
    """Returns the phase that takes so many seconds with so many processes: a part that is the same for any number, and
    one that is divided by it (or ``each``: grows with it). Neither is negative.

    From one number alone nothing tells the parts apart: all of it is divided, or none grows.
    """
    numbers = {n for n, _ in points}
    if len(numbers) == 1:
        seconds = statistics.fmean(seconds for _, seconds in points)
        return Phase(divided=seconds * numbers.pop()) if by == "divided" else Phase(fixed=seconds)
    columns = [1 / n if by == "divided" else n for n, _ in points]
    values = [seconds for _, seconds in points]
    slope, fixed = statistics.linear_regression(columns, values)
    if fixed < 0:
        slope, fixed = sum(map(float.__mul__, map(float, columns), values)) / sum(c * c for c in columns), 0.0
    elif slope < 0:
        slope, fixed = 0.0, statistics.fmean(values)
    return Phase(fixed=fixed, **{by: slope})


def learn(runs: Sequence[Run], completions: int, scoring_divides: bool = True, traffic: Traffic = Traffic()) -> Step:
    """Returns the step that these runs took, all with the same prompts a step and without overlap.

    Raises:
        ValueError: they do not fit together.
    """
    if any(run.staleness for run in runs):
        raise ValueError("Give runs with `max_staleness: 0`: in others, phases that run beside each other share cores.")
    if len({run.servers > 0 for run in runs}) > 1:
        raise ValueError("In some runs servers sample, in others the trainers: predict from one kind at a time.")
    if len({round(run.prompts) for run in runs}) > 1:
        raise ValueError("The runs have other numbers of prompts a step; their seconds cannot be compared.")
    training = [(run.trainers, run.seconds["training"] - traffic.seconds(run.trainers)) for run in runs]
    scoring = [(run.trainers, run.seconds["scoring"]) for run in runs]
    return Step(
        rollout=fit([(run.servers or run.trainers, run.seconds["rollout"]) for run in runs]),
        scoring=fit(scoring) if scoring_divides else Phase(fixed=statistics.fmean(seconds for _, seconds in scoring)),
        training=fit(training),
        sync=fit([(max(1, run.servers), run.seconds["sync"]) for run in runs], by="each"),
        other=Phase(fixed=statistics.fmean(run.other for run in runs)),
        completions=runs[0].prompts * completions,
        traffic=traffic,
    )


@dataclass(frozen=True)
class Split:
    """A number of GPUs, shared out."""

    trainers: int
    servers: int
    seconds: float


def best_split(step: Step, gpus: int, staleness: int, per_server: int = 1, least_trainers: int = 1) -> Split:
    """Returns the fastest way to share ``gpus`` between trainers and servers of ``per_server`` GPUs each.

    Raises:
        ValueError: there are too few for ``least_trainers`` (which memory asks for) and one server.
    """
    most = (gpus - least_trainers) // per_server
    if most < 1:
        raise ValueError(f"{gpus} GPUs are too few for {least_trainers} that train and {per_server} that sample.")
    splits = [(gpus - servers * per_server, servers) for servers in range(1, most + 1)]
    return min((Split(n, m, step.seconds(n, m, staleness)) for n, m in splits), key=lambda split: split.seconds)


def cost_per_million(gpus: int, price_per_hour: float, seconds: float, completions: float) -> float:
    """What a million completions cost, trained on and not only sampled.

    >>> cost_per_million(8, 2.5, seconds=36.0, completions=1000)
    200.0
    """
    return gpus * price_per_hour * seconds / 3600 / completions * 1e6


def read_run(text: str, skip: int = 1) -> Run:
    """Reads ``trainers,servers,staleness:PATH`` of a ``trainer_state.json``. The first logs count as warm-up.

    Raises:
        ValueError: it has another form, or too few logs.
    """
    numbers, _, path = text.partition(":")
    try:
        trainers, servers, staleness = map(int, numbers.split(","))
    except ValueError:
        raise ValueError(f"--run {text!r}: write trainers,servers,max_staleness:trainer_state.json") from None
    return run_of(json.loads(Path(path).read_text())["log_history"], trainers, servers, staleness, skip)


def run_of(log: Sequence[dict[str, float]], trainers: int, servers: int, staleness: int, skip: int = 1) -> Run:
    """Returns the means over a log, whose entries hold sums over the steps since the one before.

    Raises:
        ValueError: nothing is left after the first ``skip`` entries.
    """
    entries = [entry for entry in log if "time/all" in entry]
    if len(entries) <= skip:
        raise ValueError(f"The log has {len(entries)} entries with times, and {skip} count as warm-up: train longer.")
    steps = entries[-1]["step"] - (entries[skip - 1]["step"] if skip else 0)
    total = {phase: sum(entry.get(f"time/{phase}", 0.0) for entry in entries[skip:]) for phase in (*PHASES, "all")}
    prompts = sum(entry["prompts"] for entry in entries[skip:]) / steps
    return Run(trainers, servers, staleness, {phase: seconds / steps for phase, seconds in total.items()}, prompts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", nargs="+", required=True, metavar="N,M,S:PATH")
    add("--completions", type=int, required=True, help="completions of a prompt (num_completions)")
    add("--gpus", type=int, nargs="+", default=[2, 4, 8, 16])
    add("--staleness", type=int, default=1, help="max_staleness of what is predicted")
    add("--price", type=float, help="of a GPU for an hour")
    add("--gpus-per-server", type=int, default=1)
    add("--least-trainers", type=int, default=1, help="trainer GPUs that memory asks for")
    add("--scoring", choices=["divided", "fixed"], default="divided", help="fixed: a service scores, not the trainers")
    add("--gradient-gb", type=float, default=0.0, help="gradients that trainers exchange in a step")
    add("--bandwidth-gb-s", type=float, default=1.0, help="of what connects trainers, in GB/s")
    add("--sharded", action="store_true", help="weights are sharded (ZeRO-3, FSDP2) and travel as well")
    add("--passes", type=int, default=1, help="passes of a step on each GPU, with --sharded")
    add("--skip", type=int, default=1, help="logs of each run that count as warm-up")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    traffic = Traffic(args.gradient_gb * GB, args.bandwidth_gb_s * GB, args.sharded, args.passes)
    try:
        runs = [read_run(text, args.skip) for text in args.run]
        step = learn(runs, args.completions, args.scoring == "divided", traffic)
        if runs[0].servers:
            options = (args.staleness, args.gpus_per_server, args.least_trainers)
            splits = [best_split(step, gpus, *options) for gpus in args.gpus]
        else:
            splits = [Split(gpus, 0, step.seconds(gpus, 0)) for gpus in args.gpus]
    except (ValueError, OSError) as problem:
        print(f"scale.py: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    print("| GPUs | trainers | servers | step, s | completions/s | cost per million |\n|---:|---:|---:|---:|---:|---:|")
    for gpus, split in zip(args.gpus, splits, strict=True):
        speed = step.completions / split.seconds
        cost = (
            "" if args.price is None else f"{cost_per_million(gpus, args.price, split.seconds, step.completions):.2f}"
        )
        print(f"| {gpus} | {split.trainers} | {split.servers} | {split.seconds:.2f} | {speed:.1f} | {cost} |")


if __name__ == "__main__":
    main()
