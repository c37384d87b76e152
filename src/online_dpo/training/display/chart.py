"""Small charts of a run's figures, as SVG in HTML: nothing has to be loaded to draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from online_dpo.training.display.figures import number

WIDTH, HEIGHT, TOP, BOTTOM, SIDE = 210, 96, 22, 16, 6
POINTS = 400
"""Most points of a line; of more, evenly spaced ones are drawn, and the last."""

Point = tuple[int, float]
"""A step, and the figure at it."""


def charts(figures: Mapping[str, Sequence[Point]]) -> str:
    """Return a chart for each figure that has two points or more, side by side."""
    drawn = [_chart(name, _finite(points)) for name, points in figures.items() if len(_finite(points)) > 1]
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(drawn)}</div>' if drawn else ""


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _chart(name: str, points: Sequence[Point]) -> str:
    """A line over steps, with its name and last value above, and its ends below."""
    every = math.ceil(len(points) / POINTS)
    points = [*points[:-1:every], points[-1]]
    (first, _), (last, value) = points[0], points[-1]
    low, high = min(v for _, v in points), max(v for _, v in points)
    place = [
        (_scaled(step, first, last, SIDE, WIDTH - SIDE), _scaled(v, low, high, HEIGHT - BOTTOM, TOP))
        for step, v in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    x, y = place[-1]
    texts = [
        _text(SIDE, 14, "start", escape(name)),
        _text(WIDTH - SIDE, 14, "end", f"<tspan font-weight='bold'>{number(value)}</tspan>"),
        _text(SIDE, HEIGHT - 4, "start", f"step {first}"),
        _text(WIDTH / 2, HEIGHT - 4, "middle", f"{number(low)} to {number(high)}"),
        _text(WIDTH - SIDE, HEIGHT - 4, "end", str(last)),
    ]
    label = f"{escape(name)}: {number(value)} at step {last}"
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'style="color:inherit;font:10px sans-serif">'
        f'<polyline points="{line}" fill="none" stroke="#3b82c4" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#3b82c4"/>{"".join(texts)}</svg>'
    )


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    """The place of a value between two ends; the middle where all values are the same."""
    return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor">{text}</text>'
