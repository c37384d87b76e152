"""The quickstart's recipe and its judge, from the command line, with models that know next to nothing."""

import json
from pathlib import Path

import pytest

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.models import TINY
from online_dpo.quickstart.run import write_run_file
from support.processes import run_python

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_the_quickstart_with_a_pairwise_judge(tmp_path):
    """What docs/guides/judges.md shows, as it is run by `make figures` with models that know more."""
    folder = tmp_path / "runs" / "quickstart"
    build(folder / "start", size=TINY)
    run_file = write_run_file(folder)

    def python(*words):
        done = run_python(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = python(RECIPES / "judges" / "quickstart.py", "runs/quickstart/start", "--comparisons", 40)
    template = "{prompt} {first}<eos>{prompt} {second}<eos>"
    assert f"Template: {template!r}" in said
    judge = ("--judge", "runs/quickstart/start/judge", "--judge_kwargs", json.dumps({"template": template}))
    few = ("--max_steps", 2, "--logging_steps", 1, "--num_completions", 2)
    saved = ("--save_strategy", "steps", "--save_steps", 2, "--output_dir", "runs/judged")
    recipe = ("-m", "online_dpo", "train", run_file)
    python(*recipe, "--reward_model_path", "null", *judge, *few, *saved)
    state = json.loads((tmp_path / "runs" / "judged" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["judge/too_long"] for log in state["log_history"] if "judge/duels" in log] == [0.0, 0.0]
    model = ("--model", "runs/judged", "--json", "figures.json")
    python("-m", "online_dpo", "eval", run_file, *model)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["duels"] == TINY.prompts_validation
    assert 0 <= figures["win_rate"]["low"] <= figures["win_rate"]["high"] <= 1


@pytest.mark.slow
def test_a_judge_of_nothing_is_refused(tmp_path):
    script = RECIPES / "judges" / "quickstart.py"
    done = run_python(script, tmp_path)
    assert done.returncode == 2 and "`online-dpo quickstart` makes one" in done.stderr
