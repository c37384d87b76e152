"""The picture of docs/concepts/over-optimization.md: a score and the truth behind it, with distance from the start.

    python benchmarks/overoptimization.py                          # draws it from the stored figures
    python benchmarks/overoptimization.py --run runs/quickstart    # reads the figures of a quickstart anew, then draws

On the left the best of n answers by a score with errors, simulated. On the right a run of the quickstart: all of its
completions, as they were recorded, by the reward model that it was trained on and by the rubric that it never saw.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean

import numpy as np

from online_dpo.quickstart.rubric import rubric
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.report.charts import Axes, Line, line_chart, picture

FIGURES = Path(__file__).with_name("results") / "overoptimization.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "over-optimization.svg"
STEPS_A_POINT = 5
COLOURS = ".line.c1 { stroke: #b8550a } .label.c1 { fill: #b8550a }"
KL = "KL to the start, nats"


def best_of_n(groups: int = 4000, seed: int = 0) -> list[dict[str, float]]:
    """Simulate the best of n answers by a score whose errors have heavy tails: its score, its quality, and the KL."""
    rng = np.random.default_rng(seed)
    points = []
    for n in (2**power for power in range(11)):
        quality = rng.normal(size=(groups, n))
        score = quality + 0.7 * rng.standard_t(3, size=(groups, n))
        best = score.argmax(axis=1)[:, None]
        points.append(
            {
                "n": n,
                "kl": math.log(n) - (n - 1) / n,
                "score": float(np.take_along_axis(score, best, 1).mean()),
                "gold": float(np.take_along_axis(quality, best, 1).mean()),
            }
        )
    return points


def quickstart(folder: Path) -> list[dict[str, float]]:
    """Read a run of the quickstart: mean scores of its completions and their KL, over every few steps."""
    run = RunFolder(folder)
    groups = [group for frame in run.all_frames() for group in run.groups(frame)]
    points = []
    for first in range(1, max(group["step"] for group in groups) + 1, STEPS_A_POINT):
        own = [group for group in groups if first <= group["step"] < first + STEPS_A_POINT]
        answers = [(group["prompt"], answer) for group in own for answer in group["completions"]]
        points.append(
            {
                "step": first + STEPS_A_POINT - 1,
                "kl": mean(answer["logp"] - answer["ref_logp"] for _, answer in answers if "logp" in answer),
                "score": mean(answer["score"] for _, answer in answers),
                "gold": mean(rubric(prompt, answer["text"]) for prompt, answer in answers),
            }
        )
    return points


def draw(figures: dict[str, list[dict[str, float]]]) -> str:
    """Draw both charts side by side."""
    charts = []
    for title, name, x, key in (
        ("Best of n by a score with errors (simulated)", "best_of_n", KL, "kl"),
        ("The quickstart's training", "quickstart", "optimizer step", "step"),
    ):
        lines = [
            Line(label, [(point[key], point[kind]) for point in figures[name]], colour=colour)
            for colour, (label, kind) in enumerate((("score", "score"), ("truth", "gold")))
        ]
        charts.append((title, line_chart(lines, Axes(x, "mean"), title)))
    svg = picture(charts, "A score and the truth behind it")
    return svg.replace("</style>", f"{COLOURS}\n</style>", 1)


def main() -> None:
    """Read the figures, anew if a run is given, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a quickstart; without it: the stored figures")
    run = parser.parse_args().run
    if run is not None:
        figures = {"best_of_n": best_of_n(), "quickstart": quickstart(run)}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(draw(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
