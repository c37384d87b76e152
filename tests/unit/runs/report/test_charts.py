"""Charts: what is drawn stands where its value belongs, and words that differ are marked."""

import re
import xml.etree.ElementTree as ET

import pytest

from online_dpo.runs.report.charts import (
    HEIGHT,
    WIDTH,
    Axes,
    Line,
    bar_chart,
    line_chart,
    picture,
    scatter_chart,
    short,
    stacked_chart,
    ticks,
)
from online_dpo.runs.report.text import differing, seen

SVG = "{http://www.w3.org/2000/svg}"
AXES = Axes("optimizer step", "nats")


def of(chart, tag, kind):
    return [e for e in ET.fromstring(str(chart)).iter(f"{SVG}{tag}") if kind in e.get("class", "").split()]


def texts(chart):
    return [e.text for e in ET.fromstring(str(chart)).iter(f"{SVG}text")]


def places(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d. -]+)", path.get("d"))]


def value_at(chart, y):
    """The value of a height, from the labels and lines of the grid."""
    lines = [float(e.get("y1")) for e in of(chart, "line", "grid")]
    labels = [float(e.text) for e in of(chart, "text", "faint") if e.get("x") == "39"]
    (y0, y1), (v0, v1) = lines[:2], labels[:2]
    return v0 + (y - y0) / (y1 - y0) * (v1 - v0)


def test_points_of_a_line_have_the_heights_of_their_values():
    values = [(1, 0.25), (2, 0.5), (3, 1.75), (4, 1.0)]
    chart = line_chart([Line("kl", values, [(x, y - 0.1, y + 0.1) for x, y in values])], AXES, "KL")
    [line], [band] = of(chart, "path", "line"), of(chart, "path", "band")
    assert [value_at(chart, y) for _, y in places(line)] == pytest.approx([y for _, y in values], abs=0.01)
    xs = [x for x, _ in places(line)]
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)
    assert [value_at(chart, y) for _, y in places(band)[:4]] == pytest.approx([y + 0.1 for _, y in values], abs=0.01)
    assert {"optimizer step", "nats", "1"} <= set(texts(chart)) and all(0 <= x <= WIDTH for x in xs)


def test_a_single_value_has_its_interval():
    axes = Axes("optimizer step", "share", y_range=(0, 1))
    chart = line_chart([Line("", [(100, 0.9)], [(100, 0.75, 1.0)], dots=True)], axes, "")
    interval = places(of(chart, "path", "line")[1])
    assert [value_at(chart, y) for _, y in interval] == pytest.approx([0.75, 1.0], abs=0.01)
    assert interval[0][0] == interval[1][0] and len(of(chart, "circle", "point")) == 1


def test_lines_are_named_at_their_ends_and_names_do_not_overlap():
    chart = line_chart([Line("one", [(0, 0), (1, 1.0)]), Line("two", [(0, 1), (1, 1.001)], colour=1)], AXES, "")
    labels = of(chart, "text", "label")
    assert {label.text for label in labels} == {"one 1", "two 1"}
    heights = sorted(float(label.get("y")) for label in labels)
    assert heights[1] - heights[0] >= 11 and heights[1] < HEIGHT


@pytest.mark.parametrize(
    "points", [[], [(1, 0.0)], [(1, 5.0), (1, 5.0)], [(1, 1e-300), (2, 1e300)], [(1, -1e9), (2, 1e9)]]
)
def test_any_numbers_make_a_chart(points):
    for chart in (line_chart([Line("", points)], AXES, "t"), scatter_chart(points, AXES, "t")):
        assert "nan" not in chart and "inf" not in chart and ET.fromstring(str(chart)) is not None


def test_columns_and_bars_have_the_sizes_of_their_parts():
    chart = stacked_chart([("1", {"pair": 3.0, "tie": 1.0}), ("2", {"pair": 4.0, "tie": 0.0})], AXES, "t")
    heights = [float(e.get("height")) for e in of(chart, "rect", "bar")]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2) and heights[2] == pytest.approx(4 * heights[1], abs=0.3)
    bars = bar_chart({"rollout": 30.0, "training": 10.0}, "s", "t")
    widths = [float(e.get("width")) for e in of(bars, "rect", "bar")]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.3) and "30 s, 75%" in texts(bars)


def test_text_in_charts_stays_text():
    hostile = "<script>alert('1')</script>\u202e\x00\"&"
    charts = [line_chart([Line(hostile, [(1, 1)]), Line("b", [(1, 2)])], Axes(hostile, hostile), hostile)]
    charts += [bar_chart({hostile: 1.0}, hostile, hostile), stacked_chart([(hostile, {hostile: 1.0})], AXES, hostile)]
    for chart in [*charts, picture([(hostile, charts[0])], hostile)]:
        assert "<script" not in chart and "\u202e" not in chart
        assert not list(ET.fromstring(str(chart)).iter(f"{SVG}script"))


def test_ticks_are_round_and_inside():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(-0.5, 0.5, 4) == [-0.5, -0.25, 0, 0.25, 0.5]
    for low, high in ((0.0031, 0.0078), (-7e8, 3e9), (99.5, 100.5)):
        assert 2 <= len(ticks(low, high)) <= 8 and all(low <= t <= high for t in ticks(low, high))
    assert [short(v) for v in (0.0, -1234.5, 2.5e9, 0.00012)] == ["0", "-1,234", "2.5B", "0.00012"]


def test_words_that_differ_are_marked_and_nothing_else_changes():
    before, after = differing("a red <b> car", "a blue <b> car")
    assert (before, after) == ("a <mark>red</mark> &lt;b&gt; car", "a <mark>blue</mark> &lt;b&gt; car")
    assert differing("same\n  text", "same\n  text") == ("same\n  text", "same\n  text")
    long = "word " * 5000
    assert "<mark>" not in differing(long, long + "x")[1]
    assert seen("x" * 2000).endswith("(500 more characters)") and seen("\ud800\r") == "⟨U+D800⟩⟨U+000D⟩"
