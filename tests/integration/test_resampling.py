"""`resample_rounds`: prompts whose completions give no pair are answered again, within their step."""

import threading
import time
import zlib
from functools import wraps

import numpy as np
import pytest
import torch

from online_dpo.errors import NothingTrainedError, ScoringError
from online_dpo.pairing.rounds import latest
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.training import LENGTHS, assert_same, dataset, gradient, step_logs, trainer, weights, without_times


def coin(completions, **_):
    """0 or 1: two completions tie about every other time."""
    return [float(zlib.crc32(text.strip().encode()) % 2) for text in completions]


def watched(made):
    """Prompts and first sample of each call of the engine, as they come."""
    calls, generate = [], made.sampler.engine.generate

    def watching(prompts, num_completions, params, key):
        calls.append(([prompt.row for prompt in prompts], key.step, key.first_sample))
        return generate(prompts, num_completions, params, key)

    made.sampler.engine.generate = watching
    return calls


def tokens(completions):
    return [completion.token_ids for completion in completions]


def by_hand(made, prompts, step, rounds, reward=coin):
    """The rounds of each prompt up to the one that gives a pair, from one call that samples all there may be."""
    groups = made.sampler.engine.generate(prompts, 2 * (rounds + 1), made.sampler.params, RolloutKey(42, step, 0))
    answers = []
    for group in groups:
        texts = [completion.text for completion in group.completions]
        tries = [group.completions[2 * r : 2 * r + 2] for r in range(rounds + 1)]
        scores = [reward(texts[2 * r : 2 * r + 2]) for r in range(rounds + 1)]
        needed = next((r for r, (a, b) in enumerate(scores) if a != b), rounds)
        answers.append((tries[: needed + 1], scores[: needed + 1]))
    return answers


# what is sampled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3])
def test_each_prompt_is_answered_until_it_gives_a_pair_with_the_samples_that_come_next(tmp_path, rounds):
    made, prompts = trainer(tmp_path, reward_funcs=coin, resample_rounds=rounds), tiny.prompts(LENGTHS)
    answers = by_hand(made, prompts, 5, rounds)
    calls = watched(made)
    _, answer = made.collector.sample_and_assess(5, prompts)
    feedback = answer()
    groups, scores = latest(feedback)
    assert [tokens(group.completions) for group in groups] == [tokens(tries[-1]) for tries, _ in answers]
    assert scores.values == [values[-1] for _, values in answers] == scores.by_scorer["coin"]
    assert [tokens(group.completions) for group in feedback.groups] == [tokens(tries[0]) for tries, _ in answers]
    asked = [[p for p, (tries, _) in enumerate(answers) if len(tries) > r] for r in range(rounds + 1)]
    assert calls == [(rows, 5, 2 * r) for r, rows in enumerate(asked) if rows]  # all prompts of a round in one call
    assert [again.places for again in feedback.further] == [rows for rows in asked[1:] if rows]
    assert 3 <= len(asked[1]) < 12 and all(
        tokens(tries[0]) != tokens(tries[-1]) for tries, _ in answers if len(tries) > 1
    )


def test_the_log_counts_groups_once_and_scores_of_first_answers(tmp_path):
    """A mean over the last answers would say 0.5 wherever a pair was found, however good the policy is."""

    def rarely(completions, **_):
        return [float(zlib.crc32(text.strip().encode()) % 5 == 0) for text in completions]

    made = trainer(tmp_path, reward_funcs=rarely, resample_rounds=2, per_device_train_batch_size=12)
    answers = by_hand(made, tiny.prompts(LENGTHS), 0, 2, rarely)
    made.train()
    [log] = step_logs(made)
    pairs = sum(scores[-1][0] != scores[-1][1] for _, scores in answers)
    again = sum(len(scores) > 1 for _, scores in answers)
    assert 12 - again < pairs < 12
    assert log["prompts"] == 12 and log["pairs/groups"] == log["pairs/count"] == pairs
    assert log["dropped/tie"] == 12 - pairs and log["pairs/usable_ratio"] == pairs / 12
    assert log["resample/groups"] == again and log["resample/rescued"] == pairs - (12 - again)
    first, last = (np.mean([scores[i] for _, scores in answers]) for i in (0, -1))
    assert log["objective/scores"] == log["scores/rarely"] == pytest.approx(first) != pytest.approx(last)
    lengths = [len(completion.token_ids) for tries, _ in answers for completion in tries[0]]
    assert log["completions/mean_length"] == np.mean(lengths)


@pytest.mark.parametrize(
    "reason, reward, fields",
    [
        ("tie", lambda completions, **_: [1.0] * len(completions), {}),
        ("missing_score", lambda completions, **_: [None, 1.0] * (len(completions) // 2), {}),
        ("margin", lambda completions, **_: [0.0, 1.0] * (len(completions) // 2), dict(min_margin=2.0)),
        ("identical", lambda completions, **_: [0.0, 1.0] * (len(completions) // 2), dict(temperature=1e-6)),
    ],
)
def test_a_group_that_never_gives_a_pair_ends_after_the_rounds_and_counts_once(tmp_path, reason, reward, fields):
    scored = []

    def counting(completions, **columns):
        scored.append(len(completions))
        return reward(completions)

    made = trainer(tmp_path, reward_funcs=counting, resample_rounds=3, **fields)
    before = weights(made.model)
    with pytest.raises(NothingTrainedError, match=f"{reason} 4"):
        made.train()
    [log] = step_logs(made)
    assert scored == [8] * 4
    assert log["prompts"] == log[f"dropped/{reason}"] == log["resample/groups"] == 4
    assert log["resample/rescued"] == log["pairs/count"] == 0
    assert sum(value for name, value in log.items() if name.startswith("dropped/")) == 4
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def test_where_every_group_gives_a_pair_rounds_change_nothing(tmp_path):
    def all_differ(completions, **_):
        return [float(i) for i in range(len(completions))]

    runs = [trainer(tmp_path, reward_funcs=all_differ, max_steps=3, resample_rounds=rounds) for rounds in (0, 2)]
    calls = watched(runs[1])
    for made in runs:
        made.train()
    assert [first for _, _, first in calls] == [0, 0, 0]
    assert all(torch.equal(p, runs[1].model.get_parameter(name)) for name, p in runs[0].model.named_parameters())
    off, on = ([without_times(log) for log in step_logs(made)] for made in runs)
    assert [{"resample/groups": 0, "resample/rescued": 0} | log for log in off] == on


def test_a_judge_is_asked_about_the_further_answers_and_its_comparisons_are_counted(tmp_path):
    asked = []

    class Undecided:
        name = "undecided"

        def prefer(self, comparisons):
            asked.append(len(comparisons))
            chances = [coin([completion.text for completion in comparison.completions]) for comparison in comparisons]
            return [None if a == b == 0 else (1 + a - b) / 2 for a, b in chances]

    options = dict(reward_funcs=None, kwargs={"judge": Undecided()}, per_device_train_batch_size=12)
    made = trainer(tmp_path, resample_rounds=2, **options)
    answers = by_hand(made, tiny.prompts(LENGTHS), 0, 2)
    made.train()
    [log] = step_logs(made)
    again = sum(len(scores) > 1 for _, scores in answers)
    assert asked == [12, again, sum(len(scores) > 2 for _, scores in answers)]
    assert log["judge/duels"] == sum(asked)
    unanswered = sum(pair == [0.0, 0.0] for _, scores in answers for pair in scores)
    assert log["judge/unanswered_ratio"] == pytest.approx(unanswered / sum(asked))
    pairs = sum(scores[-1][0] != scores[-1][1] for _, scores in answers)
    assert log["pairs/count"] == pairs and log["resample/rescued"] == pairs - 12 + again


def test_xpos_opponent_keeps_its_answer(tmp_path):
    other = tiny.causal_lm(seed=5, sharpness=1.0)
    options = dict(method="xpo", reward_funcs=coin, resample_rounds=2, kwargs={"ref_model": other})
    made, prompts = trainer(tmp_path, **options), tiny.prompts(LENGTHS)
    own = made.sampler.engine.generate(prompts, 3, made.sampler.params, RolloutKey(42, 4, 0))
    _, answer = made.collector.sample_and_assess(4, prompts)
    feedback = answer()
    rounds = [0] * len(prompts)
    for again in feedback.further:
        for place in again.places:
            rounds[place] += 1
    assert set(rounds) == {0, 1, 2}
    groups, _ = latest(feedback)
    for p, (first, last) in enumerate(zip(feedback.groups, groups, strict=True)):
        assert last.completions[0].token_ids == own[p].completions[rounds[p]].token_ids
        assert last.completions[1] is first.completions[1]
        assert [completion.author for completion in last.completions] == ["policy", "reference"]


def test_evaluation_asks_once(tmp_path):
    made = trainer(
        tmp_path,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        resample_rounds=3,
        kwargs={"eval_dataset": dataset(lengths=(4, 5, 6, 7))},
    )
    calls = watched(made)
    made.evaluate()
    assert calls == [([0, 1, 2, 3], 0, 0)]


# invariants -----------------------------------------------------------------------------------------------------------


def test_gradient_does_not_depend_on_accumulation(tmp_path):
    options = dict(reward_funcs=coin, resample_rounds=2)
    whole = gradient(tmp_path, per_device_train_batch_size=8, **options)
    for batch, accumulation in ((4, 2), (2, 4)):
        cut = gradient(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options)
        assert_same(cut, whole, 1e-5)
    without = gradient(tmp_path, per_device_train_batch_size=8, reward_funcs=coin)
    assert sum((whole[name] - without[name]).norm() for name in whole) > 1e-3


def with_dropout():
    return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)


def one_or_none(prompts, pairs, **_):
    """A judge by `coin`; -1, no answer, where it is even."""
    coins = [coin(pair) for pair in pairs]
    return [-1 if first == second else int(second) for first, second in coins]


RESUMED = {
    "rewards": dict(num_completions=3, pair_selection="best_random"),
    "a judge": dict(reward_funcs=None, kwargs={"judge": one_or_none}),
    "xpo": dict(method="xpo"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    options = dict(max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.02, disable_dropout=False)
    options |= dict(reward_funcs=coin, resample_rounds=2) | RESUMED[kind]
    whole = trainer(tmp_path, model=with_dropout(), **options)
    whole.train()
    resumed = trainer(tmp_path, model=with_dropout(), **options)
    torch.rand(17)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in whole.model.named_parameters())
    ours, theirs = ([without_times(log) for log in step_logs(made)] for made in (resumed, whole))
    assert ours == theirs and sum(log["resample/rescued"] for log in theirs[2:]) > 0


@pytest.mark.slow
def test_a_run_that_failed_in_a_further_round_goes_on_from_where_it_was(tmp_path):
    options = dict(max_steps=4, resample_rounds=2, disable_dropout=False, learning_rate=0.02)
    scored = []

    @wraps(coin)
    def failing(completions, trainer_state, **_):
        scored.append((trainer_state.global_step, len(completions)))
        if trainer_state.global_step == 2 and len(completions) < 8:
            raise ConnectionError("the reward service is away")
        return coin(completions)

    whole = trainer(tmp_path / "whole", model=with_dropout(), reward_funcs=coin, **options)
    whole.train()
    failed = trainer(tmp_path / "failed", model=with_dropout(), reward_funcs=failing, **options)
    with pytest.raises(ScoringError, match="the reward service is away"):
        failed.train()
    assert scored[-2] == (2, 8) and scored[-1][1] < 8
    resumed = trainer(tmp_path / "failed", model=with_dropout(), reward_funcs=coin, **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in whole.model.named_parameters())
    ours, theirs = ([log["resample/groups"] for log in step_logs(made)] for made in (resumed, whole))
    assert ours == theirs


# beside training ------------------------------------------------------------------------------------------------------


class Beside(TransformersEngine):
    """An engine with a copy of the weights, which samples while the policy is trained, as a server does."""

    overlaps = True

    def __init__(self):
        super().__init__(tiny.causal_lm("gpt2", sharpness=1.0), tiny.tokenizer())
        self.versions = {}

    def sync(self, model, version):
        self.model.load_state_dict(model.state_dict())
        self.version = version

    def generate(self, prompts, num_completions, params, key):
        assert threading.current_thread() is not threading.main_thread()
        self.versions.setdefault(key.step, []).append(self.version)
        return super().generate(prompts, num_completions, params, key)


def beside(tmp_path, max_staleness, engine, **fields):
    model = tiny.causal_lm("gpt2", sharpness=1.0)
    options = dict(max_steps=5, learning_rate=0.02, train_dataset=dataset(lengths=LENGTHS * 2), reward_funcs=coin)
    made = trainer(tmp_path, model=model, max_staleness=max_staleness, **options, **fields)
    made.args.resample_rounds = 3  # what the configuration leaves to vLLM servers
    made.sampler.engine = engine
    return made


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_all_rounds_of_a_step_sample_with_the_same_weights(tmp_path, max_staleness):
    """Further rounds of step 2 come when step 3 is about to begin, which gives the engine other weights."""

    class Late(Beside):
        def generate(self, prompts, num_completions, params, key):
            if key.step == 2 and key.first_sample == num_completions:
                while made.state.global_step < 3 - max_staleness:
                    time.sleep(0.01)
                time.sleep(0.3)
            return super().generate(prompts, num_completions, params, key)

    made = beside(tmp_path, max_staleness, Late())
    made.train()
    versions = made.sampler.engine.versions
    assert all(versions[step] == [max(0, step - max_staleness)] * len(versions[step]) for step in range(5))
    assert len(versions[2]) > 1
    assert [log["sampling/staleness"] for log in step_logs(made)] == [min(i, max_staleness) for i in range(5)]
    assert step_logs(made)[3 - max_staleness]["time/waiting"] > 0.2


@pytest.mark.slow
def test_rounds_of_a_step_that_has_begun_are_part_of_a_checkpoint(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    whole, resumed = (beside(tmp_path, 1, Beside(), **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert min(resumed.sampler.engine.versions) == 3
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in whole.model.named_parameters())
    ours, theirs = ([without_times(log) for log in step_logs(made)] for made in (resumed, whole))
    assert ours == theirs and all(log["resample/rescued"] > 0 for log in theirs[2:])
