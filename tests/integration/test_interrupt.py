"""Ctrl-C in Python: the step ends, a whole checkpoint is saved, and the script stops."""

import os
import signal
import threading

import pytest
import torch
from transformers import TrainerCallback

from online_dpo.errors import TrainingInterrupted
from online_dpo.training.interrupt import NOTICE
from support import training


class PressCtrlC(TrainerCallback):
    """At an event of a step, once or more often."""

    def __init__(self, step, event="on_step_begin", times=1):
        self.step, self.times = step, times
        setattr(self, event, self._press)

    def _press(self, args, state, control, **kwargs):
        for _ in range(self.times if state.global_step == self.step else 0):
            signal.raise_signal(signal.SIGINT)


def interrupted(tmp_path, press, **fields):
    made = training.trainer(tmp_path / "run", max_steps=6, kwargs={"callbacks": [press]}, **fields)
    with pytest.raises(TrainingInterrupted) as stop:
        made.train()
    return made, stop.value


def test_a_script_stops_with_a_checkpoint_and_the_resumed_run_equals_the_whole_one(tmp_path, capfd):
    whole = training.trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    made, stop = interrupted(tmp_path, PressCtrlC(step=2))
    assert NOTICE in capfd.readouterr().err
    folder = str(tmp_path / "run" / "checkpoint-3")
    assert stop.checkpoint == folder and made.state.global_step == 3
    assert str(stop) == (
        f"Ctrl-C stopped the run after step 3 of 6. Checkpoint: {folder}. Go on with: "
        f"trainer.train(resume_from_checkpoint={folder!r})"
    )
    assert isinstance(stop, KeyboardInterrupt) and not isinstance(stop, Exception)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = training.trainer(tmp_path / "run", max_steps=6)
    resumed.train(resume_from_checkpoint=stop.checkpoint)
    expected = training.weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in training.weights(resumed.model).items())


def test_the_second_one_stops_at_once(tmp_path):
    made, stop = interrupted(tmp_path, PressCtrlC(step=2, times=2))
    assert made.state.global_step == 2 and stop.checkpoint is None
    assert str(stop) == "A second Ctrl-C stopped the run at once, after step 2 of 6. No checkpoint was saved."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_last_step_is_the_end_anyway(tmp_path):
    made = training.trainer(tmp_path, max_steps=3, kwargs={"callbacks": [PressCtrlC(step=2)]})
    made.train()
    assert made.state.global_step == 3


def test_an_evaluation_ends_and_no_further_step_begins(tmp_path):
    fields = dict(eval_strategy="steps", eval_steps=2)
    press = PressCtrlC(step=2, event="on_prediction_step")
    made = training.trainer(tmp_path, max_steps=6, kwargs={"callbacks": [press], "eval_dataset": held_out()}, **fields)
    with pytest.raises(TrainingInterrupted, match="after step 2 of 6") as stop:
        made.train()
    assert os.path.isfile(os.path.join(stop.value.checkpoint, "optimizer.pt"))
    assert [log["step"] for log in made.state.log_history if "eval_loss" in log] == [2]


def held_out():
    return training.dataset((3, 4))


@pytest.mark.parametrize(
    "fields",
    [
        dict(save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True),
        dict(save_strategy="best"),
    ],
    ids=["the best model at the end", "best checkpoints alone"],
)
def test_the_checkpoint_outlives_the_end_of_the_run(tmp_path, fields):
    """The first evaluation is the best, so neither later checkpoint would be kept or made."""
    fields |= dict(metric_for_best_model="first_is_best", greater_is_better=True, eval_strategy="steps", eval_steps=2)
    scores = iter((1.0, 0.5, 0.25))
    made = training.trainer(
        tmp_path,
        max_steps=6,
        kwargs={
            "callbacks": [PressCtrlC(step=3)],
            "eval_dataset": held_out(),
            "compute_metrics": lambda _: {"first_is_best": next(scores)},
        },
        **fields,
    )
    with pytest.raises(TrainingInterrupted, match="after step 4 of 6") as stop:
        made.train()
    assert os.path.isfile(os.path.join(stop.value.checkpoint, "model.safetensors"))
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = torch.load(os.path.join(stop.value.checkpoint, "optimizer.pt"), weights_only=True)
    assert {float(state["step"]) for state in saved["state"].values()} == {4.0}


def test_a_handler_of_the_users_own_stays(tmp_path):
    pressed = []

    def own(number, frame):
        pressed.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        made = training.trainer(tmp_path, max_steps=3, kwargs={"callbacks": [PressCtrlC(step=1)]})
        made.train()
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert made.state.global_step == 3 and pressed == [signal.SIGINT]


def test_the_handler_comes_back_when_training_fails(tmp_path):
    def away(completions, **_):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        raise ConnectionError

    made = training.trainer(tmp_path, reward_funcs=away)
    with pytest.raises(Exception, match="ConnectionError"):
        made.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_handle_nothing(tmp_path):
    seen = []

    def look(completions, **_):
        seen.append(signal.getsignal(signal.SIGINT))
        return training.word_reward(completions)

    thread = threading.Thread(target=training.trainer(tmp_path, reward_funcs=look).train)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
