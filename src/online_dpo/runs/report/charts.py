"""Charts as SVG: lines with bands, points, stacked bars. Text is escaped; colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from online_dpo.runs.report.text import seen

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 36
LABEL = 11
"""Height of a line of text."""
LONGEST_LABEL = 60

Point = tuple[float, float]
Area = tuple[float, float, float, float]
"""Left, top, right and bottom of what is drawn inside the axes."""


@dataclass(frozen=True)
class Line:
    """A line of a chart, with an optional band around it and a colour by number.

    >>> Line("reward", [(1, 0.2), (2, 0.4)], band=[(1, 0.1, 0.3), (2, 0.3, 0.5)], colour=0)
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart say, and their ranges where they are fixed.

    >>> Axes(x="optimizer step", y="share of right answers", y_range=(0, 1), level=0.5)

    ``level`` is a value of y that a thin line marks.
    """

    x: str
    y: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    level: float | None = None


@dataclass
class _Scale:
    """From values to places on a drawing."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(lines: Sequence[Line], axes: Axes, title: str) -> Markup:
    """Draw lines, each with its name and last value at its end."""
    shown = [line for line in lines if line.points]
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points] + [y for line in shown for _, *both in line.band for y in both]
    ys += [axes.level] if axes.level is not None else []
    area = (LEFT, TOP, WIDTH - RIGHT - _room(shown), HEIGHT - BOTTOM)
    x, y = _scales(xs, ys, axes, area)
    marks = [*_frame(x, y, axes, area)]
    for line in shown:
        marks += _drawn(line, x, y)
    return _svg([*marks, *_names(shown, x, y)], title)


def scatter_chart(points: Sequence[Point], axes: Axes, title: str, late: Sequence[Point] = ()) -> Markup:
    """Draw points in one colour, and ``late`` ones in another above them."""
    area = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    everything = [*points, *late]
    x, y = _scales([p[0] for p in everything], [p[1] for p in everything], axes, area)
    marks = [*_frame(x, y, axes, area)]
    for group, colour in ((points, 0), (late, 1)):
        marks += [_tag("circle", cx=x(px), cy=y(py), r=2, class_=f"point c{colour}") for px, py in group]
    return _svg(marks, title)


def bar_chart(parts: Mapping[str, float], unit: str, title: str) -> Markup:
    """Draw a bar for each part, with its name, value and share."""
    total, largest = sum(parts.values()), max(parts.values(), default=0.0)
    row, room = 24, WIDTH - 8
    marks = []
    for n, (name, value) in enumerate(parts.items()):
        top, share = n * row, value / total if total else 0.0
        width = max(1.0, value / largest * room) if largest else 1.0
        marks.append(_tag("rect", x=0, y=top + 14, width=width, height=6, class_=f"bar c{n % 6}"))
        marks.append(_text(0, top + 10, name))
        marks.append(_text(room, top + 10, f"{short(value)} {unit}, {share:.0%}", anchor="end"))
    return _svg(marks, title, height=max(1, len(parts)) * row)


def stacked_chart(columns: Sequence[tuple[str, Mapping[str, float]]], axes: Axes, title: str) -> Markup:
    """Draw columns of parts that add up, each column with its label below where there is room. The first part of a
    column stands at the bottom. Parts have the colours of their places among all names.
    """
    names = list(dict.fromkeys(name for _, parts in columns for name in parts))
    area = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    _, y = _scales([0, 1], [0, max((sum(parts.values()) for _, parts in columns), default=1)], axes, area)
    marks = [*_axis_y(y, area), *_captions(axes, area)]
    wide = (area[2] - area[0]) / max(1, len(columns))
    every = math.ceil(len(columns) / 6)
    for n, (label, parts) in enumerate(columns):
        left, base = area[0] + n * wide, 0.0
        for name, value in parts.items():
            top, bottom = y(base + value), y(base)
            colour = f"bar c{names.index(name) % 6}"
            marks.append(
                _tag("rect", x=left + 1, y=top, width=max(1.0, wide - 1.5), height=bottom - top, class_=colour)
            )
            base += value
        if n % every == 0:
            marks.append(_text(left + wide / 2, area[3] + 13, label, anchor="middle", faint=True))
    return _svg(marks, title)


STYLE = """
svg { background: #fff }
text { font: 11px system-ui, sans-serif; fill: #1b1f24 } .faint { fill: #5b6470 } .title { font-weight: 600 }
.grid { stroke: #e6e9ee } .axis { stroke: #d5dae1 } .level { stroke: #5b6470; stroke-dasharray: 4 3 }
.line { fill: none; stroke: #1f6fb2; stroke-width: 1.8 } .band { opacity: .2 } .band, .point, .label { fill: #1f6fb2 }
"""
"""The style of a picture that stands alone: on white, since what shows it may be light or dark."""


def picture(charts: Sequence[tuple[str, Markup]], title: str) -> str:
    """Put charts with their headings side by side into one SVG file."""
    wide, high = WIDTH + 20, HEIGHT + 34
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">')
    parts = [
        head.format(wide * len(charts), high),
        Markup("<title>{}</title><style>{}</style>").format(seen(title, 200), STYLE),
    ]
    parts.append(_tag("rect", width=wide * len(charts), height=high, fill="#fff"))
    for n, (heading, chart) in enumerate(charts):
        parts.append(Markup('<g transform="translate({} 24)">').format(n * wide + 10))
        parts.append(Markup('<text class="title" y="-8">{}</text>{}</g>').format(seen(heading, LONGEST_LABEL), chart))
    return str(Markup("").join(parts) + Markup("</svg>\n"))


def short(value: float) -> str:
    """A number with three significant digits, as an axis or a label shows it.

    >>> [short(value) for value in (0.123456, 12345, 2.0, 0.00001234, 1234567)]
    ['0.123', '12,345', '2', '1.23e-05', '1.23M']
    """
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.3g}B" if size >= 1e9 else f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two bounds, at most about ``most``.

    >>> ticks(0.0, 1.1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw * 0.9), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float], fixed: tuple[float, float] | None) -> tuple[float, float]:
    if fixed is not None:
        return fixed
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(low) * 0.1 or 1.0
        return low - spread, high + spread
    return low, high


def _scales(xs: Sequence[float], ys: Sequence[float], axes: Axes, area: Area) -> tuple[_Scale, _Scale]:
    left, top, right, bottom = area
    x = _Scale(*_range(xs, axes.x_range), left, right)
    low, high = _range(ys, axes.y_range)
    margin = 0.0 if axes.y_range is not None else 0.05 * (high - low)
    y = _Scale(low if low == 0 else low - margin, high + margin, bottom, top)
    x.ticks, y.ticks = ticks(x.low, x.high), ticks(y.low, y.high, 4)
    return x, y


def _frame(x: _Scale, y: _Scale, axes: Axes, area: Area) -> Iterator[Markup]:
    yield from _axis_y(y, area)
    for value in x.ticks:
        yield _text(x(value), area[3] + 13, short(value), anchor="middle", faint=True)
    yield _tag("line", x1=area[0], x2=area[2], y1=area[3], y2=area[3], class_="axis")
    if axes.level is not None:
        yield _tag("line", x1=area[0], x2=area[2], y1=y(axes.level), y2=y(axes.level), class_="level")
    yield from _captions(axes, area)


def _axis_y(y: _Scale, area: Area) -> Iterator[Markup]:
    for value in y.ticks:
        yield _tag("line", x1=area[0], x2=area[2], y1=y(value), y2=y(value), class_="grid")
        yield _text(area[0] - 5, y(value) + 4, short(value), anchor="end", faint=True)


def _captions(axes: Axes, area: Area) -> Iterator[Markup]:
    yield _text(area[2], HEIGHT - 6, axes.x, anchor="end", faint=True)
    yield _text(0, 11, axes.y, faint=True)


def _drawn(line: Line, x: _Scale, y: _Scale) -> Iterator[Markup]:
    colour = f"c{line.colour}"
    if line.band:
        upper = [(x(px), y(high)) for px, _, high in line.band]
        lower = [(x(px), y(low)) for px, low, _ in reversed(line.band)]
        yield _tag("path", d=_path([*upper, *lower]) + "Z", class_=f"band {colour}")
    places = [(x(px), y(py)) for px, py in line.points]
    yield _tag("path", d=_path(places), class_=f"line {colour}")
    if len(line.band) == 1:
        [(px, low, high)] = line.band
        yield _tag("path", d=_path([(x(px), y(low)), (x(px), y(high))]), class_=f"line {colour}")
    if line.dots or len(places) == 1:
        for px, py in places:
            yield _tag("circle", cx=px, cy=py, r=2.5, class_=f"point {colour}")


def _label(line: Line, several: bool) -> str:
    value = short(line.points[-1][1])
    return f"{line.name} {value}" if several and line.name else value


def _room(lines: Sequence[Line]) -> float:
    """What the labels at the ends of the lines need."""
    return max((6.1 * len(_label(line, len(lines) > 1)) for line in lines), default=0.0)


def _names(lines: Sequence[Line], x: _Scale, y: _Scale) -> Iterator[Markup]:
    """The names and last values, moved apart where they would overlap."""
    wanted = sorted(((y(line.points[-1][1]) + 4, line) for line in lines), key=lambda entry: entry[0])
    above = -math.inf
    for place, line in wanted:
        above = max(place, above + LABEL + 1)
        yield _text(x.end + 5, above, _label(line, len(lines) > 1), colour=line.colour)


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)


def _text(
    x: float, y: float, text: str, anchor: str = "start", faint: bool = False, colour: int | None = None
) -> Markup:
    kind = "faint" if faint else "label" if colour is None else f"label c{colour}"
    start = _tag("text", False, x=x, y=y, text_anchor=anchor, class_=kind)
    return start + escape(seen(text, LONGEST_LABEL)) + Markup("</text>")


def _tag(name: str, is_whole: bool = True, **attributes: str | float) -> Markup:
    given = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{}{}{}>").format(name, given, "/" if is_whole else "")


def _svg(marks: Sequence[Markup], title: str, height: float = HEIGHT) -> Markup:
    shape = Markup('width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img"').format(WIDTH, height)
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" {}><title>{}</title>')
    return head.format(shape, seen(title, LONGEST_LABEL)) + Markup("").join(marks) + Markup("</svg>")
