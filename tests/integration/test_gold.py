"""A second scorer in evaluations of real runs, and what its disagreement with the first does."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from online_dpo import OnlineDPOTrainer
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.training import LENGTHS, config, dataset, step_logs, trainer, word_reward

PROMPTS = LENGTHS * 2


def opposite(completions, **_):
    """Gold that likes nothing of what is trained on."""
    return [-score for score in word_reward(completions)]


def same_but_finer(completions, **_):
    return [3.0 * score + 1.0 for score in word_reward(completions)]


def run(tmp_path, gold=opposite, **fields):
    options = dict(max_steps=6, eval_strategy="steps", eval_steps=1, eval_on_start=True, learning_rate=1e-2, beta=0.01)
    options |= dict(num_completions=4, per_device_train_batch_size=8)
    kwargs = {"eval_dataset": dataset(PROMPTS), "eval_reward_funcs": gold}
    return trainer(tmp_path, train_dataset=dataset(PROMPTS), kwargs=kwargs, **{**options, **fields})


def evaluations(made):
    return [log for log in made.state.log_history if "eval_gold_score" in log]


def first_over(logs, patience=1):
    """By the rule in other words: the step of the evaluation that is the last of `patience` in a row."""
    in_a_row = 0
    for i in range(1, len(logs)):
        best = logs[int(np.argmax([log["eval_gold_score"] for log in logs[:i]]))]

        def moved(name, now=logs[i], best=best):
            error = math.sqrt(now[f"{name}_stderr"] ** 2 + best[f"{name}_stderr"] ** 2)
            return (now[name] - best[name]) / error

        in_a_row = in_a_row + 1 if moved("eval_objective/scores") > 2 and moved("eval_gold_score") < -2 else 0
        if in_a_row == patience:
            return logs[i]["step"]
    return None


def test_a_conflict_is_warned_of_at_the_right_evaluation(tmp_path, caplog):
    made = run(tmp_path)
    with caplog.at_level(logging.WARNING):
        made.train()
    logs = evaluations(made)
    assert [log["step"] for log in logs] == list(range(7)) and made.state.global_step == 6
    assert all(log["eval_gold_score"] == pytest.approx(-log["eval_objective/scores"]) for log in logs)
    step = first_over(logs)
    assert step is not None and step < 6
    warnings = [message for message in caplog.messages if message.startswith("Overoptimisation")]
    assert len(warnings) == 1 and f"in `eval` at step {step}: since step 0," in warnings[0]


@pytest.mark.slow
def test_a_conflict_stops_the_run_with_a_checkpoint(tmp_path, caplog):
    free = run(tmp_path / "free", overoptimisation="off")
    free.train()
    assert not any(message.startswith("Overoptimisation") for message in caplog.messages)
    for patience in (1, 2):
        folder = tmp_path / f"patience-{patience}"
        made = run(folder, overoptimisation="stop", overoptimisation_patience=patience)
        made.train()
        step = first_over(evaluations(free), patience)
        assert made.state.global_step == step < 6
        assert f"at step {step}: " in caplog.messages[-1] and caplog.messages[-1].endswith("Training stops here.")
        assert (folder / f"checkpoint-{step}" / "model.safetensors").is_file()
        assert [log["eval_gold_score"] for log in evaluations(made)] == [
            log["eval_gold_score"] for log in evaluations(free)[: step + 1]
        ]
        assert [log["step"] for log in step_logs(made)] == list(range(1, step + 1))


def test_where_only_the_best_is_saved_the_last_is_saved_as_well(tmp_path, caplog):
    """And the best by gold is what is left in the model, and named."""
    made = run(
        tmp_path,
        overoptimisation="stop",
        save_strategy="best",
        metric_for_best_model="gold_score",
        greater_is_better=True,
        load_best_model_at_end=True,
        eval_on_start=False,
    )
    made.train()
    step = first_over(evaluations(made))
    assert made.state.global_step == step and (tmp_path / f"checkpoint-{step}" / "model.safetensors").is_file()
    best = max(evaluations(made), key=lambda log: log["eval_gold_score"])["step"]
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert f"The best weights by gold are in {tmp_path / f'checkpoint-{best}'}." in caplog.text
    assert made.evaluate()["eval_gold_score"] == max(log["eval_gold_score"] for log in evaluations(made))


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best(tmp_path):
    """Stopped by patience 1 at step n, gone on with patience 2: the evaluation before the checkpoint counts."""
    first = run(tmp_path, overoptimisation="stop", logging_steps=4)
    first.train()
    step = first.state.global_step
    assert [log["step"] for log in step_logs(first)][-1] == step  # nothing is lost
    second = run(tmp_path, overoptimisation="stop", overoptimisation_patience=2, eval_on_start=False)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert second.state.global_step == first_over(evaluations(second), 2) == step + 1
    saved = json.loads((tmp_path / f"checkpoint-{step + 1}" / "trainer_state.json").read_text())
    assert [log["step"] for log in saved["log_history"] if "eval_gold_score" in log] == list(range(step + 2))


def test_agreeing_rewards_never_stop(tmp_path, caplog):
    made = run(tmp_path, gold=same_but_finer, overoptimisation="stop")
    made.train()
    assert made.state.global_step == 6
    assert evaluations(made)[-1]["eval_gold_score"] > evaluations(made)[0]["eval_gold_score"] + 1
    assert not any(message.startswith("Overoptimisation") for message in caplog.messages)


def test_gold_is_told_of_the_same_completions_and_changes_no_training(tmp_path):
    """Scores without the weights and the penalty of training, against an independent count."""
    options = dict(num_completions=3, reward_weights=[2.0], reward_normalization=["group"], missing_eos_penalty=1.0)
    options |= dict(length_penalty=0.1, max_steps=2, learning_rate=1e-3)
    kwargs = {"eval_dataset": dataset(), "ref_model": tiny.causal_lm(seed=5, sharpness=1.0)}
    with_gold = trainer(tmp_path, kwargs={**kwargs, "eval_reward_funcs": [opposite, same_but_finer]}, **options)
    kwargs = {"eval_dataset": dataset(), "ref_model": tiny.causal_lm(seed=5, sharpness=1.0)}
    without = trainer(tmp_path, kwargs=kwargs, **options)
    metrics, plain = with_gold.evaluate(), without.evaluate()
    scores, wins, prompts = [], [], tiny.prompts(LENGTHS)
    ours = with_gold.sampler.engine.generate(prompts, 3, with_gold.sampler.params, RolloutKey(42, 0, 1))
    with with_gold.reference.active() as reference:
        engine = TransformersEngine(reference, with_gold.tokenizer)
        theirs = engine.generate(prompts, 1, with_gold.sampler.params, RolloutKey(42, 0, 2))
    for mine, rival in zip(ours, theirs, strict=True):
        rival_score, *scores_here = (2 * word_reward([c.text])[0] + 1 for c in (*rival.completions, *mine.completions))
        scores += scores_here
        wins.append(np.mean([1.0 if s > rival_score else 0.5 if s == rival_score else 0.0 for s in scores_here]))
    assert metrics["eval_gold_score"] == pytest.approx(np.mean(scores))
    assert metrics["eval_gold_win_rate"] == pytest.approx(np.mean(wins)) and 0 < np.mean(wins) < 1
    assert metrics["eval_gold_win_rate_stderr"] == pytest.approx(np.std(wins, ddof=1) / math.sqrt(len(LENGTHS)))
    assert {name: metrics[name] for name in plain if "per_second" not in name and "runtime" not in name} == {
        name: value for name, value in plain.items() if "per_second" not in name and "runtime" not in name
    }
    with_gold.train()
    without.train()
    for name, parameter in without.model.named_parameters():
        assert torch.equal(parameter, with_gold.model.get_parameter(name))


def test_a_gold_model_without_a_chat_template_is_refused_before_training(tmp_path):
    gold = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, hidden_size=16))
    gold.save_pretrained(tmp_path / "gold")
    tiny.tokenizer().save_pretrained(tmp_path / "gold")
    rows = [{"prompt": [{"role": "user", "content": prompt.content}]} for prompt in tiny.prompts(LENGTHS)]
    with pytest.raises(ValueError, match="chat template"):
        OnlineDPOTrainer(
            model=tiny.causal_lm(sharpness=1.0),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config(tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(chat=True),
            eval_reward_funcs=str(tmp_path / "gold"),
        )


def test_a_gold_judge_gives_a_win_rate(tmp_path):
    def longer(prompts, pairs, shuffle_order=True):
        return [-1 if first == second else int(len(second) > len(first)) for first, second in pairs]

    kwargs = {"eval_dataset": dataset(), "ref_model": tiny.causal_lm(seed=5, sharpness=1.0), "eval_judge": longer}
    metrics = trainer(tmp_path, kwargs=kwargs).evaluate()
    assert 0 < metrics["eval_gold_win_rate"] < 1 and "eval_gold_score" not in metrics
    assert metrics["eval_gold_win_rate_ci95_low"] < metrics["eval_gold_win_rate"]


def test_a_gold_reward_model_by_its_folder(tmp_path):
    torch.manual_seed(3)
    gold = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, hidden_size=16)).eval()
    gold.save_pretrained(tmp_path / "gold")
    tiny.tokenizer().save_pretrained(tmp_path / "gold")
    kwargs = {"eval_dataset": dataset()}
    made = trainer(tmp_path, kwargs=kwargs, eval_reward_model_path=str(tmp_path / "gold"))
    by_path = made.evaluate()["eval_gold_score"]
    as_object = trainer(tmp_path, kwargs={**kwargs, "eval_reward_funcs": str(tmp_path / "gold")}).evaluate()
    assert by_path == as_object["eval_gold_score"] != 0


def test_without_a_reference_there_is_no_gold_win_rate(tmp_path):
    kwargs = {"eval_dataset": dataset(), "eval_reward_funcs": opposite}
    metrics = trainer(tmp_path, kwargs=kwargs, reference_free=True, loss_type="simpo").evaluate()
    assert "eval_gold_score" in metrics and "eval_gold_win_rate" not in metrics


@pytest.mark.parametrize(
    ("kwargs", "fields", "message"),
    [
        (
            {"eval_reward_funcs": opposite, "eval_judge": lambda **_: []},
            {},
            "Give gold rewards .* or `eval_judge`, not",
        ),
        (
            {"eval_reward_funcs": opposite},
            {"eval_reward_model_path": "x/y"},
            "`eval_reward_model_path` is given beside",
        ),
        ({}, {"overoptimisation": "stop"}, "`overoptimisation='stop'` compares the training score with a second one"),
        ({"eval_reward_funcs": "./away"}, {}, "`./away` does not exist"),
        ({"eval_judge": lambda **_: []}, {"reference_free": True, "loss_type": "simpo"}, "`eval_judge` compares with"),
        ({}, {"overoptimisation": "panic"}, "`overoptimisation` must be one of off, warn, stop"),
        ({}, {"overoptimisation_patience": 0}, "`overoptimisation_patience` must be at least 1"),
    ],
)
def test_wrong_gold_is_refused_before_the_policy_is_loaded(tmp_path, kwargs, fields, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model="owner/never-asked-for", kwargs=kwargs, **fields)
