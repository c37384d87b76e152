"""Metrics of a run as columns of numbers: little memory for any number of logs."""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from online_dpo.runs.plain_json import number

Row = dict[str, Any]

PREFIXES = ("time/", "dropped/", "perf/", "scores/", "rewards/", "objective/", "completions/", "judge/", "pairs/")
NAMES = frozenset({"loss", "grad_norm", "learning_rate", "beta", "prompts", "val/contain_eos_token"})
"""The metrics that are kept: these, and those whose names begin as `PREFIXES`."""

_OF_EVALUATION = re.compile(
    r"(?P<data>.*?)_?(?P<name>gold_win_rate|win_rate|gold_score|objective/scores|objective/kl)"
    r"(?P<bound>_ci95_low|_ci95_high)?"
)


@dataclass
class Series:
    """A metric over the steps at which it was logged.

    >>> Series(array("d", [5, 10]), array("d", [0.69, 0.61])).last
    0.61
    """

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """Adds a value."""
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(np.sum(self.values))

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    @property
    def ends(self) -> tuple[float, float]:
        """The means of the first and of the last tenth of the values."""
        count = max(1, len(self) // 10)
        return float(np.mean(self.values[:count])), float(np.mean(self.values[-count:]))

    def buckets(self, most: int) -> Iterator[tuple[float, float, float, float]]:
        """At most so many pieces of equal counts: mean step, mean value, smallest and largest value."""
        steps, values = np.asarray(self.steps), np.asarray(self.values)
        for part in np.array_split(np.arange(len(self)), min(most, len(self)) or 1):
            if len(part):
                inside = values[part]
                yield float(steps[part].mean()), float(inside.mean()), float(inside.min()), float(inside.max())


@dataclass
class Evaluated:
    """A figure of the evaluations on one dataset: its values, and the bounds of their 95 % intervals where they have
    some.
    """

    value: Series = field(default_factory=Series)
    low: Series = field(default_factory=Series)
    high: Series = field(default_factory=Series)


@dataclass
class Metrics:
    """The metrics of a run.

    ``train`` is by name. ``evaluations`` is by the dataset's prefix, such as "eval" or "eval_maths", and by name.
    ``first_time`` and ``last_time`` are seconds since 1970; ``steps`` is the last step that was logged.
    """

    train: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    evaluations: dict[str, dict[str, Evaluated]] = field(default_factory=lambda: defaultdict(_by_name))
    logs: int = 0
    steps: int = 0
    first_time: float | None = None
    last_time: float | None = None

    def get(self, name: str) -> Series | None:
        """A training metric, if it was logged."""
        return self.train.get(name)

    def starting(self, prefix: str) -> dict[str, Series]:
        """The training metrics whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): series for name, series in self.train.items() if name.startswith(prefix)}


def _by_name() -> dict[str, Evaluated]:
    return defaultdict(Evaluated)


def collect(rows: Iterable[Row]) -> Metrics:
    """Put rows of metrics into columns."""
    metrics = Metrics()
    columns: dict[tuple[bool, str], Series | None] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        metrics.logs += 1
        metrics.steps = max(metrics.steps, int(step))
        if (time := number(row.get("time"))) is not None:
            metrics.first_time, metrics.last_time = metrics.first_time or time, time
        is_evaluation = row.get("kind") == "eval"
        for name, value in row.items():
            place = is_evaluation, name
            if place not in columns:
                columns[place] = _column(metrics, is_evaluation, name)
            if (column := columns[place]) is not None and (finite := number(value)) is not None:
                column.add(step, finite)
    metrics.train = {name: series for name, series in metrics.train.items() if len(series)}
    return metrics


def _column(metrics: Metrics, is_evaluation: bool, name: str) -> Series | None:
    """The column of a metric; ``None`` if it is not kept."""
    if not is_evaluation:
        return metrics.train[name] if name in NAMES or name.startswith(PREFIXES) else None
    match = _OF_EVALUATION.fullmatch(name)
    if match is None:
        return None
    figure = metrics.evaluations[match["data"] or "eval"][match["name"]]
    return {None: figure.value, "_ci95_low": figure.low, "_ci95_high": figure.high}[match["bound"]]
