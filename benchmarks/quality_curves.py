"""Compares trainings by their points: gold scores at equal seconds and at equal KL, as tables and as a chart.

A point is ``{"step": 10, "cpu_seconds": 12.5, "gold": {"value": 3.6, "low": 3.3, "high": 3.8}, "kl": {"value": 1.1}}``;
the points of a training begin with step 0. Between two points a curve is a straight line, and nothing is said beyond
the last one. Trainings with the same seed have the same start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from online_dpo.runs.report.charts import HEIGHT, WIDTH, Axes, Line, line_chart

Point = Mapping[str, Any]
Curves = Mapping[str, Mapping[str, Sequence[Point]]]
"""The points of each row, by seed."""
Measure = Callable[[Point], float]

BEGIN = "<!-- quality: python benchmarks/quality_vs_trl.py --chart -->"
END = "<!-- end of quality -->"
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of the seconds that every training had, where rows are compared."""
KLS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
"""In nats; only those that all trainings have reached are shown."""
PLACES = 24
"""Where a chart's curves are read, at equal distances."""


def seconds_of(point: Point) -> float:
    return point["cpu_seconds"]


def kl_of(point: Point) -> float:
    return point["kl"]["value"]


def gold_of(point: Point) -> float:
    return point["gold"]["value"]


def gold_at(points: Sequence[Point], measure: Measure, place: float) -> float | None:
    """The gold score where a measure of the training has this value, ``None`` beyond its largest."""
    ordered = sorted((measure(point), gold_of(point)) for point in points)
    for (left, low), (right, high) in zip(ordered, ordered[1:], strict=False):
        if left <= place <= right:
            return high if left == right else low + (high - low) * (place - left) / (right - left)
    return None


def over_seeds(by_seed: Mapping[str, Sequence[Point]], measure: Measure, place: float) -> list[float] | None:
    """The gold scores of all seeds there, ``None`` if one of them did not get so far."""
    found = [gold_at(points, measure, place) for points in by_seed.values()]
    return None if None in found else [gold for gold in found if gold is not None]


def reached(curves: Curves, measure: Measure) -> float:
    """How far every training got by a measure."""
    return min(max(map(measure, points)) for by_seed in curves.values() for points in by_seed.values())


def compared(curves: Curves) -> dict[str, Any]:
    """Gold scores at equal seconds and at equal KL: mean, smallest and largest of the seeds for each row, and for each
    row but the first the mean difference to the first one, seed by seed.
    """
    seconds, kl = reached(curves, seconds_of), reached(curves, kl_of)
    return {
        "equal_seconds": [_at(curves, seconds_of, round(share * seconds, 1)) for share in SHARES],
        "equal_kl": [_at(curves, kl_of, place) for place in KLS if place <= kl],
        "seconds_a_step": {name: fmean(map(_seconds_a_step, by_seed.values())) for name, by_seed in curves.items()},
    }


def _seconds_a_step(points: Sequence[Point]) -> float:
    return points[-1]["cpu_seconds"] / points[-1]["step"]


def _at(curves: Curves, measure: Measure, place: float) -> dict[str, Any]:
    place = min(place, reached(curves, measure))  # rounded up
    golds = {name: over_seeds(by_seed, measure, place) for name, by_seed in curves.items()}
    first = next(iter(golds.values()))
    rows = {}
    for name, values in golds.items():
        assert values is not None and first is not None, "every training got there"
        differences = [value - other for value, other in zip(values, first, strict=True)]
        rows[name] = {
            "mean": fmean(values),
            "min": min(values),
            "max": max(values),
            "difference": fmean(differences),
            "differences": differences,
        }
    return {"at": place, "gold": rows}


def tables(result: Mapping[str, Any]) -> str:
    """Two tables in Markdown, as the page on performance shows them."""
    titles = {name: row["title"] for name, row in result["rows"].items()}
    comparison = result["comparison"]
    steps = [f"{titles[name]} {seconds:.2f}" for name, seconds in comparison["seconds_a_step"].items()]
    return "\n\n".join(
        (
            _table("CPU seconds of training", comparison["equal_seconds"], titles),
            _table("KL to the start, nats", comparison["equal_kl"], titles),
            f"CPU seconds a step: {', '.join(steps)}. Seeds: {', '.join(next(iter(result['points'].values())))}.",
        )
    )


def _table(heading: str, places: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    lines = [f"| {heading} | {' | '.join(titles.values())} |", "|" + "---:|" * (1 + len(titles))]
    for place in places:
        cells = [f"{place['at']:.3g}", *(spread(place["gold"][name]) for name in titles)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme_rows(result: Mapping[str, Any]) -> list[str]:
    """The rows of the README's table: TRL, and ours with the same settings."""
    last, middle = result["comparison"]["equal_seconds"][-1], _middle(result["comparison"]["equal_kl"])
    return [
        f"| gold score {what} | {place['gold']['trl']['mean']:.1f} | {place['gold']['ours-pairs']['mean']:.1f} |"
        for what, place in (
            (f"after {last['at']:.0f} CPU seconds of training", last),
            (f"at a KL of {middle['at']:.0f} nats", middle),
        )
    ]


def _middle(places: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return places[len(places) // 2]


def with_tables(page: str, result: Mapping[str, Any]) -> str:
    """The page with the tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{after}"


def spread(row: Mapping[str, float]) -> str:
    """
    >>> spread({"mean": 5.834, "min": 5.2, "max": 6.1})
    '5.83 (5.20 to 6.10)'
    """
    return f"{row['mean']:.2f} ({row['min']:.2f} to {row['max']:.2f})"


STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1b1f24 } .faint { fill: #5b6470 } .title { font-weight: 600 }
.grid { stroke: #e6e9ee } .axis { stroke: #d5dae1 } .band { opacity: .18 } .line { fill: none; stroke-width: 1.8 }
.line.c0 { stroke: #7a828d } .band.c0, .label.c0 { fill: #5b6470 } .line.c1 { stroke: #1f6fb2 }
.band.c1, .label.c1 { fill: #1f6fb2 } .line.c2 { stroke: #c2571a } .band.c2, .label.c2 { fill: #b04d14 }
"""


def chart(result: Mapping[str, Any]) -> str:
    """Both charts in one SVG file, on white, since what shows it may be light or dark."""
    curves = result["points"]
    seeds = len(next(iter(curves.values())))
    wide, high = WIDTH + 20, HEIGHT + 30
    parts = []
    for n, (measure, heading, axis) in enumerate(
        (
            (seconds_of, "Gold score at equal compute", "CPU seconds of training"),
            (kl_of, "Gold score at equal KL", "KL to the start, nats"),
        )
    ):
        lines = [
            _line(result["rows"][name]["short"], by_seed, measure, n)
            for n, (name, by_seed) in enumerate(curves.items())
        ]
        drawn = line_chart(lines, Axes(x=axis, y=f"gold score, mean and range of {seeds} seeds"), heading)
        parts.append(
            f'<g transform="translate({n * wide + 10} 22)"><text class="title" y="-6">{heading}</text>{drawn}</g>'
        )
    size = f'width="{2 * wide}" height="{high}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {2 * wide} {high}">'
    title = "<title>Gold scores of online-dpo and TRL, by CPU seconds and by KL</title>"
    return f'{head}{title}<style>{STYLE}</style><rect {size} fill="#fff"/>{"".join(parts)}</svg>\n'


def _line(name: str, by_seed: Mapping[str, Sequence[Point]], measure: Measure, colour: int) -> Line:
    end = min(max(map(measure, points)) for points in by_seed.values())
    band = []
    for n in range(PLACES + 1):
        place = min(end, end * n / PLACES)
        if values := over_seeds(by_seed, measure, place):
            band.append((place, min(values), max(values), fmean(values)))
    return Line(name, [(x, mean) for x, *_, mean in band], [(x, low, high) for x, low, high, _ in band], colour)
