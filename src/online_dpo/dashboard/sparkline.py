"""A small chart without axes, as points of an SVG."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, EDGE = 120, 24, 2


def sparkline(points: Sequence[tuple[float, float]]) -> str:
    """The points of a polyline in a picture of `WIDTH` by `HEIGHT`; empty with fewer than two points.

    >>> sparkline([(0, 1.0), (10, 2.0)])
    '2.0,22.0 118.0,2.0'
    """
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, width = min(xs), max(xs) - min(xs) or 1
    low, height = min(ys), max(ys) - min(ys) or 1
    places = (
        (EDGE + (x - left) / width * (WIDTH - 2 * EDGE), HEIGHT - EDGE - (y - low) / height * (HEIGHT - 2 * EDGE))
        for x, y in points
    )
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
