"""Training on the answers of a language model, asked over HTTP."""

import pytest

from endpoint import error, says, serving, shown
from online_dpo.cli.judge_plan import BuiltInJudge
from online_dpo.cli.train import _load_judge
from online_dpo.errors import FeedbackStopped
from online_dpo.scoring import LLMJudge
from training import config, trainer


def judged(tmp_path, endpoint, cache="cache.sqlite3", **fields):
    judge = LLMJudge(model="m", base_url=endpoint.url, cache=str(tmp_path / cache))
    return trainer(tmp_path, reward_funcs=None, kwargs={"judge": judge}, num_completions=2, max_steps=3, **fields)


def more_w1(body, number):
    first, second = shown(body)
    return says("A", 0.8) if first.count("w1") > second.count("w1") else says("B", 0.2)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_same_run_again_asks_nothing(tmp_path, max_staleness):
    with serving(more_w1) as endpoint:
        runs = []
        for _ in range(2):
            made = judged(tmp_path, endpoint, max_staleness=max_staleness)
            made.train()
            runs.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
        asked = len(endpoint.seen)
        judged(tmp_path, endpoint, "another.sqlite3", max_staleness=max_staleness).train()
        assert 12 < asked <= 24 and len(endpoint.seen) == 2 * asked
    assert runs[0] == runs[1] and len(runs[0]) == 3


def test_a_judge_that_stops_ends_the_run_with_its_own_error(tmp_path):
    def respond(body, number):
        return more_w1(body, number) if number < 6 else error(401, "revoked")

    with serving(respond) as endpoint, pytest.raises(FeedbackStopped, match="revoked"):
        judged(tmp_path, endpoint).train()


def test_the_judge_of_a_run_file(tmp_path):
    options = {"model": "m", "base_url": "http://localhost:1/v1", "cache": None, "votes": 3}
    judge = _load_judge(BuiltInJudge(None, options), config(tmp_path))
    assert isinstance(judge, LLMJudge) and judge.settings.votes == 3
