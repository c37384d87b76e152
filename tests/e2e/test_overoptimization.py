"""The picture of docs/concepts/over-optimization.md shows the figures that are stored, and these mean what it says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import overoptimization


@pytest.fixture(scope="module")
def figures():
    return json.loads(overoptimization.FIGURES.read_text())


def test_the_picture_is_of_the_stored_figures(figures):
    assert overoptimization.PICTURE.read_text() == overoptimization.draw(figures)


def test_the_simulation_gives_the_stored_figures_and_turns(figures):
    points = overoptimization.best_of_n()
    assert [point["gold"] for point in points] == pytest.approx([point["gold"] for point in figures["best_of_n"]])
    best = max(points, key=lambda point: point["gold"])
    assert 2 < best["kl"] < 3.5 and points[-1]["gold"] < 0.6 * best["gold"]
    assert [point["score"] for point in points] == sorted(point["score"] for point in points)


def test_in_the_quickstart_score_and_truth_rise_together(figures):
    first, *_, last = figures["quickstart"]
    assert last["score"] > first["score"] + 3 and last["gold"] > first["gold"] + 4
