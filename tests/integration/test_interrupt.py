"""Ctrl-C, SIGTERM and others in Python: the step ends, a whole checkpoint is saved, and the script stops."""

import logging
import os
import signal
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from online_dpo.errors import TrainingInterrupted, TrainingTerminated
from online_dpo.training.stop_request import NOTICE
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


# --- other signals --------------------------------------------------------------------------------------------------

OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Send(TrainerCallback):
    """Signals, at an event of a step."""

    def __init__(self, step, *numbers, event="on_step_begin"):
        self.step, self.numbers = step, numbers
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        for number in self.numbers if state.global_step == self.step else ():
            signal.raise_signal(number)


@pytest.mark.parametrize("number", OTHERS, ids=lambda number: number.name)
def test_each_signal_stops_with_a_checkpoint_however_often_it_comes(tmp_path, capfd, number):
    made, stop = interrupted(tmp_path, Send(2, number, number, number))
    folder = str(tmp_path / "run" / "checkpoint-3")
    assert isinstance(stop, TrainingTerminated) and isinstance(stop, SystemExit)
    assert stop.code == 128 + number and stop.signal is number and stop.checkpoint == folder
    assert str(stop).startswith(f"{number.name} stopped the run after step 3 of 6. Checkpoint: {folder}. Go on with: ")
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if number.name in line] == [
        f"{number.name}: stopping after this step, with a checkpoint.",
        str(stop),  # Python ends silently after a SystemExit
    ]
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "one's own"])
def test_a_signal_that_is_ignored_or_handled_by_the_user_stays_so(tmp_path, own):
    before = signal.signal(signal.SIGHUP, own)
    try:
        made = training.trainer(tmp_path, max_steps=3, kwargs={"callbacks": [Send(1, signal.SIGHUP)]})
        made.train()
        assert signal.getsignal(signal.SIGHUP) is own and made.state.global_step == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_after_another_signal_stops_at_once(tmp_path):
    made, stop = interrupted(tmp_path, Send(2, signal.SIGTERM, signal.SIGINT))
    assert made.state.global_step == 2 and stop.signal is signal.SIGINT and not isinstance(stop, SystemExit)
    assert str(stop).startswith("Ctrl-C stopped the run at once, after step 2 of 6.")


def slow_at_step(step, seconds, calls):
    def word_reward(completions, trainer_state, **_):  # the name by which checkpoints know it
        calls.append(trainer_state.global_step)
        if trainer_state.global_step == step and len(calls) == step + 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(seconds)
        return training.word_reward(completions)

    return word_reward


def test_a_step_that_takes_too_long_is_dropped_and_the_resumed_run_equals_the_whole_one(tmp_path):
    whole = training.trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    made = training.trainer(
        tmp_path / "run", max_steps=4, stop_timeout=0.2, reward_funcs=slow_at_step(2, seconds=60, calls=[])
    )
    since = time.monotonic()
    with pytest.raises(TrainingTerminated, match="SIGTERM stopped the run after step 2 of 4. Checkpoint: ") as stop:
        made.train()
    assert time.monotonic() - since < 30
    resumed = training.trainer(tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=stop.value.checkpoint)
    expected = training.weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in training.weights(resumed.model).items())


def test_an_evaluation_that_takes_too_long_is_dropped(tmp_path):
    class SlowEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    kwargs = {"callbacks": [SlowEvaluation()], "eval_dataset": held_out()}
    fields = dict(eval_strategy="steps", eval_steps=2, stop_timeout=0.1)
    made = training.trainer(tmp_path, max_steps=6, kwargs=kwargs, **fields)
    with pytest.raises(TrainingTerminated, match="SIGTERM stopped the run after step 2 of 6") as stop:
        made.train()
    assert stop.value.checkpoint == str(tmp_path / "checkpoint-2")


class DuringASave(TrainerCallback):
    """The trainer writes its model card in every save."""

    def __init__(self, made, *numbers):
        write = made.create_model_card

        def writing(*args, **kwargs):
            for number in numbers:
                signal.raise_signal(number)
            write(*args, **kwargs)

        made.create_model_card = writing


@pytest.mark.parametrize(
    ("numbers", "stops_with"),
    [
        ((signal.SIGINT,), "Ctrl-C stopped the run after step 2 of 6. Checkpoint: "),
        ((signal.SIGINT, signal.SIGINT), "Ctrl-C stopped the run after step 2 of 6. Checkpoint: "),
        ((signal.SIGTERM, signal.SIGTERM), "SIGTERM stopped the run after step 2 of 6. Checkpoint: "),
        ((signal.SIGINT,) * 3, "A second Ctrl-C stopped the run at once, after step 2 of 6. No checkpoint was saved."),
    ],
    ids=["one", "two", "two of a scheduler", "three"],
)
def test_a_save_that_has_begun_is_finished_unless_a_third_ctrl_c_stops_it(tmp_path, numbers, stops_with):
    made = training.trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    DuringASave(made, *numbers)
    with pytest.raises(TrainingInterrupted, match=stops_with):
        made.train()
    assert made.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file() is (len(numbers) < 3)


def test_a_failure_after_a_signal_is_told_as_the_signal(tmp_path):
    """As when the signal has also ended a process that the run needs."""

    def reward(completions, trainer_state, **_):
        if trainer_state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
            raise ConnectionError("the server is gone")
        return training.word_reward(completions)

    made = training.trainer(tmp_path, max_steps=4, reward_funcs=reward)
    message = "SIGTERM stopped the run after step 2 of 4 .the step after it failed: .* ConnectionError: the server is"
    with pytest.raises(TrainingTerminated, match=message) as stop:
        made.train()
    assert stop.value.checkpoint == str(tmp_path / "checkpoint-2")


def test_a_handler_that_called_code_takes_away_is_told(tmp_path, caplog):
    def reward(completions, **_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return training.word_reward(completions)

    try:
        with caplog.at_level(logging.WARNING):
            training.trainer(tmp_path, max_steps=2, reward_funcs=reward).train()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert caplog.text.count("has set a handler of its own for SIGTERM, which no longer saves a checkpoint") == 1
