"""Evaluation of a run: its numbers, its own random numbers, and what reads them."""

import numpy as np
import pytest
import torch

from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.training import LENGTHS, dataset, trainer, weights, word_reward


def test_evaluation_numbers_against_an_independent_count(tmp_path):
    made = trainer(
        tmp_path,
        kwargs={"ref_model": tiny.causal_lm(seed=5, sharpness=1.0), "eval_dataset": dataset()},
        num_completions=3,
        per_device_eval_batch_size=5,
    )
    metrics = made.evaluate()
    prompts = tiny.prompts(LENGTHS)
    ours = made.sampler.engine.generate(prompts, 3, made.sampler.params, RolloutKey(42, 0, 1))
    with made.reference.active() as reference:
        theirs = made.sampler.engine.__class__(reference, made.tokenizer).generate(
            prompts, 1, made.sampler.params, RolloutKey(42, 0, 2)
        )
        kls, wins, scores = [], [], []
        for mine, rival in zip(ours, theirs, strict=True):
            rival_score = word_reward([rival.completions[0].text])[0]
            for completion in mine.completions:
                score = word_reward([completion.text])[0]
                scores.append(score)
                wins.append(1.0 if score > rival_score else 0.5 if score == rival_score else 0.0)
                ids = torch.tensor([[*mine.prompt.token_ids, *completion.token_ids]])
                with torch.no_grad():
                    both = [
                        m(ids).logits.log_softmax(-1)[0, len(mine.prompt.token_ids) - 1 : -1]
                        for m in (made.model, reference)
                    ]
                picked = [x.gather(-1, torch.tensor(completion.token_ids)[:, None]).sum().item() for x in both]
                kls.append(picked[0] - picked[1])
    assert metrics["eval_objective/scores"] == pytest.approx(np.mean(scores))
    assert metrics["eval_win_rate"] == pytest.approx(np.mean(wins))
    assert metrics["eval_objective/kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert metrics["eval_win_rate_ci95_low"] < metrics["eval_win_rate"] < metrics["eval_win_rate_ci95_high"]
    assert metrics["eval_prompts"] == 12 and metrics["eval_loss"] > 0


@pytest.mark.smoke
def test_evaluation_repeats_exactly_and_leaves_training_alone(tmp_path):
    plain = trainer(tmp_path, max_steps=3)
    plain.train()
    watched = trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        kwargs={"eval_dataset": {"first": dataset(lengths=(3, 4)), "second": dataset(lengths=(5, 6, 7))}},
    )
    watched.train()
    for name, value in weights(plain.model).items():
        assert torch.equal(watched.model.get_parameter(name), value)
    evals = [log for log in watched.state.log_history if "eval_second_win_rate" in log]
    assert len(evals) == 4 and {log["eval_second_prompts"] for log in evals} == {3.0}
    again = watched.evaluate()
    assert again["eval_first_objective/scores"] == watched.evaluate()["eval_first_objective/scores"]
    assert again["eval_second_win_rate"] == evals[-1]["eval_second_win_rate"]


def test_the_same_prompt_in_two_evaluation_sets_is_scored_with_each_sets_own_columns(tmp_path):
    calls = []

    def keep_labels(completions, label, **_):
        calls.append(label)
        return [0.0] * len(completions)

    data = {name: dataset(lengths=(3,), label=[name]) for name in ("a", "b")}
    train = dataset(label=["train"] * len(LENGTHS))
    made = trainer(tmp_path, reward_funcs=keep_labels, train_dataset=train, kwargs={"eval_dataset": data})
    made.evaluate()
    assert calls == [["a", "a"], ["a"], ["b", "b"], ["b"]]


def test_an_untrained_policy_has_no_distance_to_its_reference_in_half_precision_either(tmp_path):
    made = trainer(tmp_path, bf16=True, kwargs={"eval_dataset": dataset()})
    assert made.evaluate()["eval_objective/kl"] == 0.0


def test_an_untrained_policy_neither_wins_nor_loses_against_itself_by_a_judge(tmp_path):
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda p, pairs, shuffle_order=True: [0] * len(p), "eval_dataset": dataset()},
    )
    metrics = made.evaluate()
    assert metrics["eval_win_rate"] == 1.0  # a judge that always says "first" is believed: position bias is its own
    assert metrics["eval_objective/kl"] == pytest.approx(0, abs=1e-5) and "eval_objective/scores" not in metrics


def test_compute_metrics_receives_scores_and_best_model_is_found(tmp_path):
    seen = []

    def best_share(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"best_share": float((prediction.predictions.max(1) > prediction.label_ids).mean())}

    made = trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="best_share",
        greater_is_better=True,
        kwargs={"eval_dataset": dataset(), "compute_metrics": best_share},
    )
    made.train()
    assert seen[0] == ((12, 2), (12,)) and made.state.best_metric is not None
    assert made.predict(dataset(lengths=(4, 5))).predictions.shape == (2, 2)
