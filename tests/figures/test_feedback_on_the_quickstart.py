"""The table of docs/feedback.md, from the command line as a user runs it: what other feedback and other methods are
worth on the quickstart, by the rubric that nothing is trained on. Each run takes a minute or two.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from online_dpo.quickstart.rubric import rubric
from support.endpoint import says, serving, shown

RECIPES = Path(__file__).parents[2] / "recipes"
RUN_FILE = "runs/quickstart/run.yaml"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
STEPS = 100
PAIRWISE = {"template": "{prompt} {first}<eos>{prompt} {second}<eos>"}


@dataclass
class Figures:
    win_rate: float
    low: float
    high: float
    log: dict


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what `make quickstart` leaves behind."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(folder, "online_dpo", "quickstart")
    return folder


def run(folder, *words, module=True):
    command = [sys.executable, *(["-m"] if module else []), *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(folder, name, *options):
    """Win rate against the start on the test prompts, and the last entry of the log."""
    out = folder / "runs" / name
    options = ("--num_completions", 2, "--save_strategy", "steps", "--save_steps", STEPS, *options)
    run(folder, "online_dpo", "train", RUN_FILE, "--output_dir", out, *options)
    test = ("--prompts", "runs/quickstart/start/prompts_test.jsonl")
    run(folder, "online_dpo", "eval", RUN_FILE, "--model", out, *test, "--json", out / "eval.json")
    won = json.loads((out / "eval.json").read_text())["win_rate"]
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    print(f"{name:12} win rate {won['value']:.3f} [{won['low']:.3f}, {won['high']:.3f}]")
    return Figures(won["value"], won["low"], won["high"], state["log_history"][-1])


def judged(folder, name, respond, **settings):
    with serving(respond) as endpoint:
        given = json.dumps({"model": "m", "base_url": endpoint.url, "cache": None, **settings})
        return trained(folder, name, "--reward_model_path", "null", "--judge", "llm", "--judge_kwargs", given)


def fair(body):
    """0.98 for the answer that the rubric likes better."""
    [prompt] = re.findall(r"<<<REQUEST\n(.*?)\nREQUEST>>>", body["messages"][0]["content"], re.DOTALL)
    first, second = (rubric(prompt, answer) for answer in shown(body))
    return 0.5 if first == second else 0.98 if first > second else 0.02


def judge_by_the_rubric(body, number):
    p = fair(body)
    return says("A" if p >= 0.5 else "B", p if body.get("logprobs") else None)


def judge_that_likes_the_first_place(body, number):
    """0.7 for what stands first, whatever it says; by its letter alone, it always names the first."""
    return says("A", 0.7 + 0.3 * fair(body) if body.get("logprobs") else None)


def beats_the_start(figures):
    return figures.win_rate >= 0.7 and figures.low > 0.5


def test_xpo(workplace):
    assert beats_the_start(trained(workplace, "xpo", "--method", "xpo"))


def test_nash_md(workplace):
    options = ("--method", "nash_md", "--beta", 0.02, "--mixture_coef", 0.25)
    assert beats_the_start(trained(workplace, "nash_md", *options))


def test_a_pairwise_model(workplace):
    run(workplace, RECIPES / "judges" / "quickstart.py", "runs/quickstart/start", module=False)
    judge = ("--judge", "runs/quickstart/start/judge", "--judge_kwargs", json.dumps(PAIRWISE))
    assert beats_the_start(trained(workplace, "pairwise", "--reward_model_path", "null", *judge))


def test_a_language_model_as_judge(workplace):
    assert beats_the_start(judged(workplace, "llm", judge_by_the_rubric))


def test_a_judge_that_likes_the_first_place(workplace):
    both = judged(workplace, "both_orders", judge_that_likes_the_first_place)
    given = judged(workplace, "one_order", judge_that_likes_the_first_place, order="given", logprobs=False)
    assert beats_the_start(both) and given.low < 0.5
    assert both.log["judge/position_bias"] == pytest.approx(0.85, abs=0.01)
    assert given.log["judge/position_bias"] == 1.0
