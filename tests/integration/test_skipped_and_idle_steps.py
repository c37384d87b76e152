"""After skipped steps the learning rate falls for a while, and a run in which nothing is trained any more stops."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import TrainerCallback

from online_dpo.errors import NothingTrainedError, TrainingStalledError
from support import tiny
from support.training import dataset, step_logs, trainer, weights, without_times, word_reward

BACKOFF = dict(skipped_step_lr_factor=0.25, skipped_step_lr_recovery=2, learning_rate=0.01, max_steps=6)
SAVED = dict(save_strategy="steps", save_steps=1)


def poisoned(made, steps):
    """Makes the loss of these steps (1 is the first) NaN, in a resumed run too."""

    def hook(module, args, output):
        bad = module.training and made[0].state.global_step + 1 in steps
        return (output[0] * math.nan, output[1]) if bad else None

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    return model


def run_with(tmp_path, steps, **fields):
    box = []
    box.append(trainer(tmp_path, model=poisoned(box, steps), tie_policy="first", **fields))
    return box[0]


class Rates(TrainerCallback):
    """The learning rates that the optimizer has while it updates."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "reduce_lr_on_plateau"])
def test_the_learning_rate_of_the_log_is_the_one_used(tmp_path, schedule):
    rates = Rates()
    fields = {**BACKOFF, "lr_scheduler_type": schedule}
    kwargs = {}
    if schedule == "reduce_lr_on_plateau":
        fields |= {"eval_strategy": "epoch", "lr_scheduler_kwargs": {"patience": 0}}
        kwargs["eval_dataset"] = dataset(lengths=(3, 4))
    made = run_with(tmp_path, {2}, kwargs={"callbacks": [rates], **kwargs}, **fields)
    made.train()
    logs = step_logs(made)
    factors = [1.0, 0.25, 0.25, 0.5, 1.0, 1.0]
    assert [log["guard/lr_factor"] for log in logs] == factors
    trained = [0, 2, 3, 4, 5]
    assert [logs[i]["learning_rate"] for i in trained] == pytest.approx([rates.seen[i] for i in trained], rel=1e-12)
    plain = trainer(
        tmp_path / "plain", kwargs=kwargs, **{**fields, "skipped_step_lr_factor": 1.0, "skipped_step_lr_recovery": 100}
    )
    plain.train()
    scheduled = [log["learning_rate"] for log in step_logs(plain)]
    assert [log["learning_rate"] for log in logs] == pytest.approx(
        [rate * factor for rate, factor in zip(scheduled, factors, strict=True)], rel=1e-12
    )
    assert not [log for log in step_logs(plain) if "guard/lr_factor" in log]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_has_the_same_learning_rates_and_counts(tmp_path, stop):
    fields = {**BACKOFF, **SAVED, "lr_scheduler_type": "linear"}
    whole = run_with(tmp_path, {2, 3}, **fields)
    whole.train()
    resumed = run_with(tmp_path, {2, 3}, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], weight), name
    ours, theirs = ([json.dumps(without_times(log), sort_keys=True) for log in step_logs(m)] for m in (resumed, whole))
    assert ours == theirs  # as text: NaN is no equal of itself
    assert json.loads((tmp_path / "checkpoint-3" / "guard.json").read_text()) == {
        "kind": "GuardCounts",
        "trained_steps": 1,
        "skipped_steps": 2,
        "skipped_in_a_row": 2,
        "idle": {"not finite": 2},
        "learning_rate_debt": 4,
    }


def test_a_user_s_own_optimizer_and_schedule(tmp_path):
    model = tiny.causal_lm(sharpness=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = Rates()
    made = trainer(
        tmp_path,
        model=model,
        tie_policy="first",
        kwargs={"optimizers": (optimizer, schedule), "callbacks": [rates]},
        **BACKOFF,
    )
    box = [made]
    bad = lambda module, args, output: (  # noqa: E731
        (output[0] * math.nan, output[1]) if module.training and box[0].state.global_step == 1 else None
    )
    model.register_forward_hook(bad)
    made.train()
    assert rates.seen == pytest.approx([0.5, 0.25, 0.125 / 4, 0.0625 / 2, 0.03125, 0.015625])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**7)


def test_a_schedule_free_optimizer(tmp_path):
    pytest.importorskip("schedulefree")
    made = run_with(tmp_path, {2}, **{**BACKOFF, "optim": "schedule_free_adamw"})
    made.train()
    assert [log["guard/lr_factor"] for log in step_logs(made)] == [1.0, 0.25, 0.25, 0.5, 1.0, 1.0]


# idle steps ---------------------------------------------------------------------------------------------------------


def ties_from(first):
    """Scores that are all the same from this step on."""
    calls = []

    def reward(completions, **columns):
        calls.append(1)
        return word_reward(completions) if len(calls) < first else [1.0] * len(completions)

    return reward


def test_a_run_that_trains_nothing_any_more_stops_with_a_checkpoint_and_says_why(tmp_path):
    made = trainer(tmp_path, reward_funcs=ties_from(3), max_steps=9, max_idle_steps=4)
    with pytest.raises(TrainingStalledError) as caught:
        made.train()
    assert str(caught.value) == (
        "4 steps in a row trained nothing (without a pair 4); stopped at step 6. Dropped of 16 prompts: tie 16. The "
        f"run is saved in {tmp_path}/checkpoint-6. See why the completions of a prompt get no different scores; "
        "`max_idle_steps` sets the limit."
    )
    assert (tmp_path / "checkpoint-6" / "guard.json").is_file()
    went_on = trainer(tmp_path, reward_funcs=word_reward, max_steps=9, max_idle_steps=5, resume_anyway=True)
    went_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert went_on.guard.trained_steps == 5 and not went_on.guard.idle


def test_idle_steps_before_a_checkpoint_count_after_it(tmp_path):
    made = trainer(tmp_path, reward_funcs=ties_from(2), max_steps=4, max_idle_steps=5, **SAVED)
    made.train()
    resumed = trainer(tmp_path, reward_funcs=ties_from(1), max_steps=9, max_idle_steps=5)
    with pytest.raises(TrainingStalledError, match=r"5 steps in a row .*\(without a pair 5\); stopped at step 6"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_one_that_never_trained_anything_stops_as_such(tmp_path):
    made = trainer(tmp_path, reward_funcs=ties_from(1), max_steps=9, max_idle_steps=2)
    with pytest.raises(NothingTrainedError, match=r"tie 8.*Of 2 steps: without a pair 2.*It stopped after 2 steps"):
        made.train()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_trained_step_between_them_begins_the_count_anew(tmp_path):
    calls = []

    def every_third(completions, **columns):
        calls.append(1)
        return [float(i) if len(calls) % 3 == 0 else 1.0 for i, _ in enumerate(completions)]

    made = trainer(tmp_path, reward_funcs=every_third, max_steps=9, max_idle_steps=3)
    made.train()
    assert (made.state.global_step, made.guard.trained_steps) == (9, 3)


def test_without_a_limit_it_goes_on(tmp_path):
    made = trainer(tmp_path, reward_funcs=ties_from(2), max_steps=5, max_idle_steps=None)
    made.train()
    assert made.state.global_step == 5
