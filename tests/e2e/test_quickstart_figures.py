"""`benchmarks/quickstart_figures.py` trains, compares and prints its table, with models that know next to nothing."""

import json
from pathlib import Path

import pytest

from support.processes import run_python

ROOT = Path(__file__).parents[2]


def test_a_judge_that_always_names_the_first_has_a_position_bias_of_one(tmp_path):
    pytest.importorskip("openai")
    few = ("--tiny", "--steps", "2", "--row", "llm_one_order", "--json", str(tmp_path / "figures.json"))
    done = run_python(ROOT / "benchmarks" / "quickstart_figures.py", *few)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "figures.json").read_text())
    [(name, row)] = result["rows"].items()
    assert (name, result["steps"], row["position_bias"]) == ("llm_one_order", 2, 1.0)
    assert 0 < row["low"] <= row["win_rate"] <= row["high"] < 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("| the same judge")]
    assert line.endswith(f"| {row['win_rate']:.2f}, {row['low']:.2f} to {row['high']:.2f} | 1.00 |")
