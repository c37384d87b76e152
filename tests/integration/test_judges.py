"""Judges in a run: they find the pairs, and what they cannot do is refused."""

import math

import numpy as np
import pytest
from datasets import Dataset

from online_dpo import OnlineDPOTrainer
from online_dpo.data.collate import prompts_from_batch
from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.training import LENGTHS, LongerIsBetter, config, dataset, train_logs, trainer


@pytest.mark.parametrize("as_callable", [False, True])
def test_a_judge_picks_the_pairs(tmp_path, as_callable):
    judge = LongerIsBetter()
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": judge.judge if as_callable else judge},
        per_device_train_batch_size=12,
        model=tiny.causal_lm(sharpness=1.0, eos_token_id=[1, 5, 6, 7, 8]),
    )
    made.sampler.params = made.sampler.params.__class__(
        **{**made.sampler.params.__dict__, "end_token_ids": (1, 5, 6, 7, 8)}
    )
    made.train()
    [log] = train_logs(made)
    undecided = sum(len(a.split()) == len(b.split()) for a, b in judge.pairs)
    assert len(judge.prompts) == 12 and 0 < undecided < 12
    assert log["dropped/no_answer"] == undecided and log["pairs/count"] == 12 - undecided
    assert log["completions/chosen_minus_rejected_length"] > 0
    assert "objective/scores" not in log and "objective/rlhf_reward" not in log


@pytest.mark.parametrize("num_completions", [3, 4, 5])
def test_a_judge_finds_best_and_worst_of_several(tmp_path, num_completions):
    judge = LongerIsBetter()
    ends = (1, 5, 6, 7, 8, 9, 10, 11, 12)
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": judge, "eval_dataset": dataset()},
        num_completions=num_completions,
        per_device_train_batch_size=12,
        model=tiny.causal_lm(sharpness=1.0, eos_token_id=list(ends)),
    )
    made.sampler.params = made.sampler.params.__class__(**{**made.sampler.params.__dict__, "end_token_ids": ends})
    made.train()
    [log] = train_logs(made)
    assert log["judge/duels"] == len(judge.pairs) <= 12 * (math.ceil(3 * num_completions / 2) - 1)
    undecided = sum(len(a.split()) == len(b.split()) for a, b in judge.pairs)
    assert log["judge/unanswered_ratio"] == pytest.approx(undecided / len(judge.pairs))
    dropped = sum(value for name, value in log.items() if name.startswith("dropped/"))
    assert 0 < log["pairs/count"] == 12 - dropped
    assert log["completions/chosen_minus_rejected_length"] > 2
    assert 0 < made.evaluate()["eval_win_rate"] < 1


def test_what_a_judge_cannot_do_is_refused(tmp_path):
    for fields in (dict(pair_selection="all_pairs"), dict(min_margin=1.0), dict(label_temperature=1.0)):
        with pytest.raises(ValueError, match="needs scores"):
            trainer(tmp_path, reward_funcs=None, kwargs={"judge": LongerIsBetter()}, **fields)


def test_completions_that_did_not_end_lose_before_a_judge(tmp_path):
    """The judge would always take the first; the penalty is larger than its certainty."""
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda prompts, pairs, shuffle_order=True: [0] * len(pairs)},
        missing_eos_penalty=50.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},
        per_device_train_batch_size=12,
    )
    prompts = [p for b in made.get_train_dataloader() for p in prompts_from_batch(b)]
    _, answer = made.collector.sample_and_assess(0, prompts)
    feedback = answer()
    ended = [[c.finish_reason == "stop" for c in group.completions] for group in feedback.groups]
    chosen = [preference.chosen for preference in feedback.said.preferences]
    assert [False, True] in ended and chosen == [int(e == [False, True]) for e in ended]


def test_they_lose_in_evaluation_as_well(tmp_path):
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda prompts, pairs, shuffle_order=True: [0] * len(pairs), "eval_dataset": dataset()},
        missing_eos_penalty=50.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},
    )
    metrics = made.evaluate()
    prompts = tiny.prompts(LENGTHS)
    ours = made.sampler.engine.generate(prompts, 2, made.sampler.params, RolloutKey(42, 0, 1))
    expected = []
    for group, rival in zip(ours, made.reference_answers.to(prompts), strict=True):
        mine, theirs = (g.completions[0].finish_reason == "stop" for g in (group, rival))
        expected.append(0.0 if theirs and not mine else 1.0)
    assert 0.0 in expected and metrics["eval_win_rate"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_judge_sees_conversations_through_the_chat_template(tmp_path):
    judge = LongerIsBetter()
    rows = [{"prompt": [{"role": "user", "content": p.content}]} for p in tiny.prompts([3] * 4)]
    OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        judge=judge,
        args=config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(chat=True),
    ).train()
    assert sorted(judge.prompts) == sorted(f"<unk> {row['prompt'][0]['content']} w0 " for row in rows)


def test_both_a_judge_and_a_reward_warn_and_use_the_reward(tmp_path):
    judge = LongerIsBetter()
    with pytest.warns(UserWarning, match="the reward is used"):
        made = trainer(tmp_path, kwargs={"judge": judge})
    made.train()
    assert not judge.prompts and "scores/word_reward" in train_logs(made)[0]


def test_reward_model_path_beside_a_judge_is_the_reward_that_wins(tmp_path):
    with pytest.warns(UserWarning, match="the reward is used"), pytest.raises(ValueError, match="no/reward"):
        trainer(tmp_path, reward_funcs=None, reward_model_path="./no/reward", kwargs={"judge": LongerIsBetter()})
