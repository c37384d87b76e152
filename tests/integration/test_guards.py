"""Steps that must not count: without pairs, or not finite (invariant 11 of docs/project/architecture)."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from online_dpo.errors import TrainingDivergedError
from support import tiny
from support.training import trainer, weights


def test_a_step_without_pairs_leaves_weights_and_optimizer_alone(tmp_path):
    """Weight decay and momentum would move them even with a gradient of zero."""
    calls = []

    def only_first_step(completions, **_):
        calls.append(1)
        return [float(i) for i in range(len(completions))] if len(calls) == 1 else [1.0] * len(completions)

    made = trainer(
        tmp_path, reward_funcs=only_first_step, max_steps=2, weight_decay=0.5, save_strategy="steps", save_steps=1
    )
    made.train()
    after_first = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(p, made.model.get_parameter(name)) for name, p in after_first.named_parameters())
    assert made.state.log_history[1]["dropped/tie"] == 4


def poison(model, at_steps):
    """Makes the log-probabilities of these training forwards NaN (1 is the first)."""
    count = [0]

    def hook(module, args, output):
        if module.training:
            count[0] += 1
            if count[0] in at_steps:
                return output[0] * float("nan"), output[1]
        return None

    model.register_forward_hook(hook)
    return model


def optimizer_state(made):
    return {(i, k): v.clone() for i, s in made.optimizer.state_dict()["state"].items() for k, v in s.items()}


@pytest.mark.parametrize("accumulation, poisoned", [(1, {2}), (2, {3}), (2, {4})])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone(tmp_path, accumulation, poisoned):

    seen = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((weights(made.model), optimizer_state(made)))

    made = trainer(
        tmp_path,
        model=poison(tiny.causal_lm(sharpness=1.0), poisoned),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        weight_decay=0.1,
        kwargs={"callbacks": [Snapshot()]},
    )
    made.train()
    for before, after in zip(seen[0], seen[1], strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(seen[1][0][name], seen[2][0][name]) for name in seen[1][0])
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert [h["guard/skipped_steps"] for h in made.state.log_history if "guard/skipped_steps" in h] == [0, 1, 1]


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(tmp_path):
    made = trainer(
        tmp_path, model=poison(tiny.causal_lm(sharpness=1.0), {2, 4, 5, 6}), max_steps=9, max_skipped_steps=3
    )
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row.*checkpoint-6"):
        made.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(p, made.model.get_parameter(name)) for name, p in saved.named_parameters())


def test_loss_is_a_mean_over_pairs_and_the_last_steps_are_logged(tmp_path):
    """Steps 1 and 3 have no pairs: they count nowhere, neither as zero nor as lost."""
    calls = []

    def every_second(completions, **_):
        calls.append(1)
        return [float(i % 2) if len(calls) % 2 == 0 else 1.0 for i in range(len(completions))]

    made = trainer(tmp_path, reward_funcs=every_second, max_steps=3, logging_steps=2)
    made.train()
    logs = [log for log in made.state.log_history if "prompts" in log]
    assert [log["prompts"] for log in logs] == [8, 4]
    assert logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and "loss" not in logs[1]


def test_steps_without_any_pair_are_warned_of_once_until_there_are_some(tmp_path, caplog):
    steps = iter([True, True, False, True])

    def reward(completions):
        missing = next(steps)
        return [None if missing else float(number) for number, _ in enumerate(completions)]

    trainer(tmp_path, reward_funcs=reward, max_steps=4).train()
    said = [record.getMessage() for record in caplog.records if "Nothing was trained" in record.getMessage()]
    assert said == [
        f"Nothing was trained since the last log, at step {step}: none of 4 prompts gave a pair (missing_score 4)."
        for step in (1, 4)
    ]
