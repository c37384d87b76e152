"""The charts of a report: which numbers of a run they show, and how."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from online_dpo.runs.report.charts import Axes, Line, Point, line_chart, scatter_chart, stacked_chart
from online_dpo.runs.report.facts import RunFacts
from online_dpo.runs.report.series import Evaluated, Series

STEP = "optimizer step"
POINTS = 160
"""Points of a line: more than can be seen apart."""
SCATTERED = 600
COLUMNS = 24
PAIR = "pair"

OVER_STEPS = (
    ("objective/scores", "Reward", "mean score of all completions"),
    ("objective/kl", "KL to the reference", "nats a completion"),
    ("loss", "Loss", "mean of the pairs"),
    ("rewards/accuracies", "Accuracy of the implied reward", "share of pairs"),
    ("rewards/margins", "Implied reward margin", "beta × log-ratio, chosen − rejected"),
    ("completions/mean_length", "Length of the answers", "tokens"),
)
"""Metrics that are shown over the steps: name, heading, unit."""


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, perhaps a sentence below it, and names with the numbers of their colours."""

    title: str
    chart: Markup
    caption: str = ""
    legend: Sequence[tuple[str, int]] = ()


def curve(series: Series, name: str = "", colour: int = 0) -> Line:
    """A metric as a line: its means over pieces of the run, within a band from the smallest to the largest value."""
    found = list(series.buckets(POINTS))
    is_thinned = len(series) > POINTS
    band = [(step, low, high) for step, _, low, high in found] if is_thinned else []
    return Line(name, [(step, mean) for step, mean, _, _ in found], band, colour)


def over_steps(facts: RunFacts) -> Iterator[Figure]:
    """A chart for each metric that was logged."""
    for name, title, unit in OVER_STEPS:
        if (series := facts.metrics.get(name)) is not None:
            yield Figure(title, line_chart([curve(series)], Axes(STEP, unit), f"{title} by step"))


def reward_against_kl(facts: RunFacts) -> Figure | None:
    """The reward that the run has bought, over the KL that it has paid."""
    points = _reward_and_kl(facts)
    if points is None:
        return None
    line = Line("", points, dots=len(points) <= 40)
    axes = Axes("KL to the reference, nats", "reward, mean score")
    caption = "From the start at the left: how much reward each nat of distance from the reference has brought."
    return Figure("Reward against KL", line_chart([line], axes, "Reward against KL"), caption)


def _reward_and_kl(facts: RunFacts) -> list[Point] | None:
    reward, kl = (facts.metrics.get(name) for name in ("objective/scores", "objective/kl"))
    if reward is None or kl is None:
        return None
    kl_at = dict(zip(kl.steps, kl.values, strict=True))
    both = [(kl_at[step], value) for step, value in zip(reward.steps, reward.values, strict=True) if step in kl_at]
    pieces = np.array_split(np.asarray(both), min(60, len(both))) if both else []
    return [(float(piece[:, 0].mean()), float(piece[:, 1].mean())) for piece in pieces] or None


def win_rates(facts: RunFacts) -> Iterator[Figure]:
    """The win rates of the evaluations with their intervals, a chart for each dataset."""
    for data, figures in facts.metrics.evaluations.items():
        lines = [
            _with_interval(figures[name], label, colour)
            for name, label, colour in (("win_rate", "win rate", 0), ("gold_win_rate", "gold", 1))
            if name in figures and len(figures[name].value)
        ]
        if lines:
            title = f"Win rate against the reference: {data}"
            axes = Axes(STEP, "share of answers that win, 95 % interval", y_range=(0, 1), level=0.5)
            yield Figure(title, line_chart(lines, axes, title))


def _with_interval(figure: Evaluated, name: str, colour: int) -> Line:
    band = []
    if len(figure.low) == len(figure.high) == len(figure.value):
        band = list(zip(figure.value.steps, figure.low.values, figure.high.values, strict=True))
    points = list(zip(figure.value.steps, figure.value.values, strict=True))
    keep = max(1, len(points) // POINTS)
    return Line(name, points[::keep], band[::keep], colour, dots=len(points) <= 40)


def reward_against_length(facts: RunFacts) -> Figure | None:
    """A sample of the recorded answers: those of the first third of the steps and those of the last."""
    groups = facts.groups
    if len(groups.scores) < 3:
        return None
    third = groups.last_step / 3
    rng = random.Random(0)
    chosen = rng.sample(range(len(groups.scores)), min(2 * SCATTERED, len(groups.scores)))
    at = [(groups.score_steps[n], (groups.lengths[n], groups.scores[n])) for n in sorted(chosen)]
    early = [point for step, point in at if step <= third][:SCATTERED]
    late = [point for step, point in at if step > 2 * third][:SCATTERED]
    axes = Axes("length of the answer, tokens", "score")
    title, names = "Reward against length", [("first third of the steps", 0), ("last third", 1)]
    return Figure(title, scatter_chart(early, axes, title, late), legend=names)


def why_no_pair(facts: RunFacts) -> Figure | None:
    """What became of the recorded groups over the steps."""
    groups = facts.groups
    if not groups.groups:
        return None
    pieces = np.array_split(np.arange(1, groups.last_step + 1), min(COLUMNS, groups.last_step))
    edges = np.asarray([*(piece[0] for piece in pieces), groups.last_step + 1]) - 0.5
    parts = {PAIR: groups.with_pairs, **dict(sorted(groups.reasons.items(), key=lambda entry: -len(entry[1])))}
    counts = {name: np.histogram(np.asarray(steps), edges)[0] for name, steps in parts.items()}
    columns = [
        (f"{piece[0]}", {name: float(count[n] / len(piece)) for name, count in counts.items()})
        for n, piece in enumerate(pieces)
    ]
    title = "Groups with a pair, and why others have none"
    chart = stacked_chart(columns, Axes(f"from {STEP}", "recorded groups a step"), title)
    return Figure(title, chart, legend=[(name, n % 6) for n, name in enumerate(parts)])


def margins(facts: RunFacts) -> Figure | None:
    """The middle of the pairs' margins over the steps, and between what bounds four fifths of them are."""
    series = facts.groups.margins
    if not len(series):
        return None
    steps, values = np.asarray(series.steps), np.asarray(series.values)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    line, band = [], []
    every = np.unique(steps)
    for part in np.array_split(every, min(40, len(every))):
        inside = slice(*np.searchsorted(steps, (part[0], part[-1] + 0.5)))
        low, middle, high = (float(q) for q in np.percentile(values[inside], (10, 50, 90)))
        step = float(part.mean())
        line.append((step, middle))
        band.append((step, low, high))
    chart = line_chart([Line("", line, band)], Axes(STEP, "score of the chosen − the rejected"), "Margins of the pairs")
    return Figure("Margins of the pairs", chart, "Line: the median. Band: from the 10th to the 90th percentile.")


def memory(facts: RunFacts) -> Figure | None:
    """The most memory so far of host and device."""
    names = (("perf/device_memory_peak", "device", 1), ("perf/host_memory_peak", "host", 0))
    lines = [curve(series, label, n) for name, label, n in names if (series := facts.metrics.get(name)) is not None]
    return Figure("Memory", line_chart(lines, Axes(STEP, "GiB, the most so far"), "Memory by step")) if lines else None
