"""A run that failed once and is resumed equals a run that never failed (invariants 5 and 13)."""

import json
import random
from functools import wraps

import numpy
import pytest
import torch
from datasets import IterableDataset
from transformers import TrainerCallback

from online_dpo.errors import OnlineDPOError
from support import tiny
from support.training import dataset, step_logs, trainer, weights, without_times, word_reward

STEPS = 5
OPTIONS = dict(max_steps=STEPS, lr_scheduler_type="linear", per_device_train_batch_size=2, num_completions=3)


def fails_once(at):
    """A reward that raises in its call number ``at``."""
    calls = []

    @wraps(word_reward)
    def reward(completions, **_):
        calls.append(completions)
        if len(calls) == at:
            raise ConnectionError("away")
        return word_reward(completions)

    return reward


class FailsOnce(TrainerCallback):
    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise OSError("no space left")


def run(folder, resume=None, reward=word_reward, kwargs=None, **options):
    model = tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)
    options = {"disable_dropout": False, **OPTIONS, **options}
    made = trainer(folder, model=model, reward_funcs=reward, kwargs=kwargs and kwargs(), **options)
    made.train(resume_from_checkpoint=resume)
    return made


def same_as_never_failed(tmp_path, fail, **options):
    """Runs three times: whole, until ``fail`` (arguments of `run`) ends it, and on from there."""
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(OnlineDPOError):
        run(tmp_path / "failed", **{**options, **fail})
    resumed = run(tmp_path / "failed", resume=True, **options)
    assert resumed.state.global_step == STEPS
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())
    logs = [[without_times(log) for log in step_logs(made)] for made in (whole, resumed)]
    for log in [log for made in logs for log in made]:
        del log["train/updated_ratio"]  # since the checkpoint, in the first log after it
    assert logs[1] == logs[0] and logs[0][-1]["step"] == STEPS
    return resumed


@pytest.mark.parametrize("max_staleness", [1, 2])
@pytest.mark.parametrize("failing_call", [2, 3, 5])
def test_completions_of_a_step_whose_reward_failed_are_scored_again(tmp_path, max_staleness, failing_call):
    same_as_never_failed(tmp_path, {"reward": fails_once(failing_call)}, max_staleness=max_staleness)


OTHER_SETTINGS = {
    "no step ahead": dict(max_staleness=0),
    "accumulation and the end of an epoch": dict(
        max_staleness=1, gradient_accumulation_steps=2, train_dataset=dataset([5, 9, 3, 7, 12, 4])
    ),
    "rounds": dict(max_staleness=0, resample_rounds=2),
    "xpo": dict(max_staleness=1, method="xpo", num_completions=2),
    "nash_md": dict(method="nash_md", num_completions=2, temperature=1.0),
    "a reference and a beta that move": dict(
        max_staleness=1, sync_ref_model=True, ref_model_sync_steps=2, target_kl=0.5, learning_rate=0.02
    ),
    "a save before the failure": dict(max_staleness=1, save_strategy="steps", save_steps=1),
    "logs of several steps": dict(max_staleness=1, logging_steps=5),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
@pytest.mark.parametrize("failing_call", [2, 4])
def test_a_failed_reward_in_other_settings(tmp_path, name, failing_call):
    same_as_never_failed(tmp_path, {"reward": fails_once(failing_call)}, **OTHER_SETTINGS[name])


EVENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_fails_once(tmp_path, event):
    options = dict(max_staleness=1, gradient_accumulation_steps=2, num_completions=2)
    same_as_never_failed(tmp_path, {"kwargs": lambda: {"callbacks": [FailsOnce(event, 2)]}}, **options)


def test_a_stream_whose_reward_failed(tmp_path):
    rows = dataset(lengths=(5, 9, 3, 7, 12, 4)).to_list()

    def stream():
        return IterableDataset.from_generator(lambda: iter(rows))

    whole = run(tmp_path / "whole", train_dataset=stream(), max_staleness=1)
    with pytest.raises(OnlineDPOError):
        run(tmp_path / "failed", train_dataset=stream(), max_staleness=1, reward=fails_once(4))
    resumed = run(tmp_path / "failed", resume=True, train_dataset=stream(), max_staleness=1)
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())


def test_an_interrupted_run_that_had_failed_ahead(tmp_path):
    """The reward of a later step has failed when a checkpoint of this one is saved."""
    options = dict(max_staleness=2, save_strategy="steps", save_steps=1)
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(OnlineDPOError):
        run(tmp_path / "failed", reward=fails_once(5), **options)
    for step in (3, 4):
        resumed = run(tmp_path / "failed", resume=str(tmp_path / "failed" / f"checkpoint-{step}"), **options)
        expected = weights(whole.model)
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())
    saved = json.loads((tmp_path / "failed" / "checkpoint-3" / "lookahead-0.json").read_text())
    assert [(step["step"], step["seconds"] is None) for step in saved["steps"]] == [(3, False), (4, True)]


def test_a_reward_that_draws_random_numbers_draws_the_same_again(tmp_path):
    """With dropout, which draws from the same generators after it."""

    def noisy(at):
        calls = []

        def reward(completions, **_):
            calls.append(completions)
            noise = [torch.rand(()).item() + random.random() + numpy.random.rand() for _ in completions]
            if len(calls) == at:
                raise ConnectionError("away")
            return [score + drawn for score, drawn in zip(word_reward(completions), noise, strict=True)]

        return reward

    options = dict(save_strategy="steps", save_steps=2, max_steps=STEPS + 3)  # six steps an epoch
    whole = run(tmp_path / "whole", reward=noisy(None), **options)
    for failing in (4, 7):
        with pytest.raises(OnlineDPOError):
            run(tmp_path / f"failed-{failing}", reward=noisy(failing), **options)
        resumed = run(tmp_path / f"failed-{failing}", resume=True, reward=noisy(None), **options)
        expected = weights(whole.model)
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())
