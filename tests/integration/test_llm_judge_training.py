"""Training on the answers of a language model, asked over HTTP."""

import hashlib
from collections import Counter

import pytest
import torch

from online_dpo import OnlineDPOConfig
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.train import load_judge
from online_dpo.errors import FeedbackStopped, NothingTrainedError
from online_dpo.scoring.judges.llm.judge import LLMJudge
from support.endpoint import Answer, error, says, serving, shown
from support.training import LENGTHS, config, dataset, step_logs, trainer, word_reward


def judged(tmp_path, endpoint, cache="cache.sqlite3", settings=None, kwargs=None, **fields):
    judge = LLMJudge(model="m", base_url=endpoint.url, cache=str(tmp_path / cache), **(settings or {}))
    fields = {"num_completions": 2, "max_steps": 3, **fields}
    return trainer(tmp_path, reward_funcs=None, kwargs={"judge": judge, **(kwargs or {})}, **fields)


def more_w1(body, number):
    first, second = shown(body)
    return says("A", 0.8) if first.count("w1") > second.count("w1") else says("B", 0.2)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_that_was_stopped_is_resumed_without_asking_again(tmp_path, max_staleness):
    options = dict(max_steps=5, max_staleness=max_staleness, num_completions=3)
    refused = []

    def revoked_for_a_while(body, number):
        if number >= 40 and not refused:
            refused.append(number)
            return error(401, "revoked")
        return more_w1(body, number)

    with serving(more_w1) as endpoint:
        whole = judged(tmp_path, endpoint, **options)
        whole.train()
        asked = len(endpoint.seen)
    with serving(revoked_for_a_while) as endpoint:
        stopped = judged(tmp_path / "stopped", endpoint, **options)
        with pytest.raises(FeedbackStopped, match="revoked"):
            stopped.train()
        assert 1 <= stopped.state.global_step < 5
        resumed = judged(tmp_path / "stopped", endpoint, **options)
        resumed.train(resume_from_checkpoint=True)
        answered = [request for number, request in enumerate(endpoint.seen) if number not in refused]
        questions = [request.body["messages"][-1]["content"] for request in answered]
        assert len(questions) == len(set(questions))
        if max_staleness == 0:  # else the step that failed is judged anew with later weights
            assert len(questions) == asked
    if max_staleness == 0:
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_judge_that_likes_the_first_place_is_told_by_the_log(tmp_path):
    """Whatever it reads, it gives 0.7 to what stands first: in both orders that is a preference for neither."""
    with serving(lambda body, number: says("A", 0.7)) as endpoint:
        both = judged(tmp_path, endpoint, num_completions=4, logging_steps=3)
        with pytest.raises(NothingTrainedError, match="tie 12"):
            both.train()
        [log] = step_logs(both)
        assert log["judge/position_bias"] == pytest.approx(0.7, abs=1e-6)
        assert log["judge/disagreement_rate"] == 1.0 and log["judge/requests"] == 2 * log["judge/duels"]
        assert log["pairs/count"] == 0 and log["dropped/tie"] == 12
        once = judged(tmp_path, endpoint, settings={"order": "given"}, logging_steps=3)
        once.train()
        [log] = step_logs(once)
        assert log["judge/position_bias"] == pytest.approx(0.7, abs=1e-6)
        assert log["pairs/probability"] == pytest.approx(0.7, abs=1e-6) and log["pairs/count"] >= 10


def digit(body):
    """The same for the same question."""
    return hashlib.sha256(body["messages"][0]["content"].encode()).digest()[0] % 10


def cannot_say_now_and_then(body, number):
    return says("I cannot say.") if digit(body) == 0 else more_w1(body, number)


@pytest.mark.slow
def test_an_endpoint_in_trouble_ends_where_a_healthy_one_does(tmp_path):
    """The first time that they are asked, questions meet 429, 500, an answer that is no JSON, a connection that says
    nothing for longer than is waited for, or a very slow one. None of it changes what is trained; all of it is counted.
    """
    asked = Counter()
    troubles = {
        1: lambda: error(429, **{"Retry-After": "0.2"}),
        2: lambda: error(500),
        3: lambda: Answer(b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"}),
        4: lambda: Answer(b"{}", delay=2.0),
        5: lambda: Answer(b"{" * 40, drip=0.1),
    }

    def in_trouble(body, number):
        question = body["messages"][0]["content"]
        asked[question] += 1
        if asked[question] == 1 and digit(body) in troubles:
            return troubles[digit(body)]()
        return cannot_say_now_and_then(body, number)

    fields = dict(max_steps=4, num_completions=3, logging_steps=4)
    logs, weights = [], []
    for name, respond in {"healthy": cannot_say_now_and_then, "in_trouble": in_trouble}.items():
        with serving(respond) as endpoint:
            settings = {"request_timeout": 1.0, "max_failure_share": 0.5}
            made = judged(tmp_path / name, endpoint, f"{name}.sqlite3", settings, **fields)
            made.train()
            [log] = step_logs(made)
            logs.append(log)
            weights.append(list(made.model.parameters()))
    healthy, troubled = logs
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))
    counts = ("judge/failed", "judge/unparsable", "judge/duels", "pairs/count", "prompts", "dropped/no_answer")
    assert {name: healthy[name] for name in counts} == {name: troubled[name] for name in counts}
    met = Counter(digit({"messages": [{"content": question}]}) for question in asked)
    assert min(met[trouble] for trouble in troubles) >= 1 and troubled["judge/unparsable"] == met[0] >= 1
    again = sum(met[trouble] for trouble in troubles)
    assert troubled["judge/requests"] == healthy["judge/requests"] + again
    assert troubled["prompts"] == troubled["pairs/count"] + sum(v for k, v in troubled.items() if "dropped/" in k)


def prefers_the_first(body, number):
    """0.7 for what stands first, whatever it says; the remaining 0.3 are for the answer with more short words."""
    first, second = (word_reward([text])[0] for text in shown(body))
    fair = 0.5 if first == second else 0.98 if first > second else 0.02
    return says("A", 0.7 + 0.3 * fair if body.get("logprobs") else None)  # A is the likelier letter in any case


@pytest.mark.slow
def test_both_orders_learn_from_a_judge_that_one_order_learns_nothing_from(tmp_path):
    """Its letter alone says only which answer stood first, as a judge that is asked once would be read. Asked in both
    orders, what it likes about the first place cancels in its probabilities.
    """
    fields = dict(max_steps=16, learning_rate=5e-3, beta=0.1, seed=2, logging_steps=16)
    fields |= dict(per_device_train_batch_size=12, train_dataset=dataset(LENGTHS * 4))
    held_out = {"eval_dataset": dataset(tuple(range(2, 14)) * 4), "eval_reward_funcs": word_reward}
    gold, log = {}, {}
    with serving(prefers_the_first) as endpoint:
        for order, settings in {"both": {}, "given": {"order": "given", "logprobs": False}}.items():
            made = judged(tmp_path / order, endpoint, settings=settings, kwargs=held_out, **fields)
            made.train()
            [log[order]] = step_logs(made)
            gold[order] = made.evaluate()
    assert gold["both"]["eval_gold_win_rate_ci95_low"] > 0.65
    assert gold["given"]["eval_gold_win_rate"] < 0.55
    assert log["both"]["judge/position_bias"] == pytest.approx(0.85) and log["both"]["judge/disagreement_rate"] == 1.0
    assert log["given"]["judge/position_bias"] == 1.0 and log["given"]["pairs/usable_ratio"] == 1.0


def test_the_judge_of_a_run_file(tmp_path):
    options = {"model": "m", "base_url": "http://localhost:1/v1", "cache": None, "votes": 3}
    judge = load_judge(BuiltInJudge(None, options), config(tmp_path))
    assert isinstance(judge, LLMJudge) and judge.settings.votes == 3


@pytest.mark.parametrize("argument", ["judge", "eval_judge"])
def test_limits_that_the_processes_cannot_share_are_refused_before_the_policy_is_loaded(
    tmp_path, monkeypatch, argument
):
    monkeypatch.setattr(OnlineDPOConfig, "world_size", 8)  # as under torchrun with 8 processes
    judge = LLMJudge(model="m", base_url="http://localhost:1/v1", cache=None, requests_per_minute=7)
    rewards = None if argument == "judge" else word_reward
    with pytest.raises(ValueError, match="`requests_per_minute` is 7, which 8 processes cannot share"):
        trainer(tmp_path, model="owner/never-asked-for", reward_funcs=rewards, kwargs={argument: judge})
