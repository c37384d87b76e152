"""Charts of a notebook, as SVG that any reader of XML takes."""

import math
from xml.etree import ElementTree

from online_dpo.training.display.chart import HEIGHT, WIDTH, charts


def points(html):
    [line] = ElementTree.fromstring(html).iter("polyline")
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_a_line_goes_from_the_first_step_to_the_last_and_from_lowest_to_highest():
    drawn = points(charts({"a & <b>": [(10, 1.0), (20, 3.0), (30, 2.0)]}))
    assert drawn == [(6.0, HEIGHT - 16.0), (WIDTH / 2, 22.0), (WIDTH - 6.0, (HEIGHT - 16 + 22) / 2)]


def test_what_stands_around_the_line():
    html = charts({"a & <b>": [(10, 1.0), (20, 3.0), (25, math.nan), (30, 2.0)]})
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(html).iter("text")]
    assert texts == ["a & <b>", "2", "step 10", "1 to 3", "30"]


def test_no_chart_of_one_point_and_a_level_line_of_equal_ones():
    assert charts({"loss": [(1, 0.5)], "kl": [(1, math.inf), (2, 1.0)]}) == ""
    assert {y for _, y in points(charts({"loss": [(1, 0.5), (2, 0.5)]}))} == {(HEIGHT - 16 + 22) / 2}


def test_many_points_are_thinned_and_the_last_stays():
    drawn = points(charts({"loss": [(step, float(step)) for step in range(10_000)]}))
    assert len(drawn) <= 402 and drawn[-1] == (WIDTH - 6.0, 22.0)
