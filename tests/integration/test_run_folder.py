"""The folder that a run writes: what is in it; a resumed run has every row once (docs/reference/run-folder)."""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from online_dpo.errors import CheckpointError, TrainingInterrupted
from online_dpo.runs.beginning import ForeignFileError
from online_dpo.runs.layout import METRICS, completions_files
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.state import state_of
from support import killed_runs, run_files, tiny, training

OPTIONS = dict(run_folder=True, max_steps=6, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)


def made(folder, **fields):
    return training.trainer(folder, model=tiny.causal_lm(sharpness=1.0), **{**OPTIONS, **fields})


def rows_of(folder):
    """Rows of metrics without times, and groups, of a run folder."""
    run = RunFolder(folder)
    metrics = [without_times(row) for row in run.metrics().rows if "train_runtime" not in row]
    return metrics, [group for at in run.all_frames() for group in run.groups(at)]


def without_times(row):
    """What is the same in every run, and in one that was resumed."""
    kept = {k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "train/updated_ratio"))}
    return {k: v for k, v in kept.items() if not k.endswith(("time", "restored", "_per_second"))}


def kinds_of(folder):
    return [event["kind"] for event in RunFolder(folder).events().rows]


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class LogsMore(TrainerCallback):
    """Logs something beside each log of a step, as a user's callback may."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.trainer.log({"mine": float(state.global_step)})


def fails():
    raise RuntimeError("away")


def test_a_run_leaves_its_settings_environment_metrics_events_and_completions(tmp_path):
    trainer = made(tmp_path)
    trainer.train()
    run = RunFolder(tmp_path)
    assert run.settings["max_steps"] == 6 and "hub_token" not in run.settings
    [session] = run.environment["sessions"]
    assert session["processes"] == 1 and session["versions"]["torch"]
    _, groups = rows_of(tmp_path)
    rows = [{k: v for k, v in row.items() if k not in ("kind", "time")} for row in run.metrics().rows]
    assert rows == trainer.state.log_history
    assert [(group["step"], group["index"]) for group in groups] == [(s, i) for s in range(1, 7) for i in range(2)]
    events = run.events().rows
    kinds = [event["kind"] for event in events if event["kind"] != "idle"]
    assert kinds == ["start", "checkpoint", "checkpoint", "checkpoint", "end"]
    assert (events[-1]["code"], events[-1]["state"], state_of(tmp_path)) == (0, "finished", "finished")


def test_in_python_nothing_is_written_unless_asked_for(tmp_path):
    made(tmp_path, run_folder=None, save_strategy="no", max_steps=1).train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(max_staleness=1),
        dict(resample_rounds=2),
        dict(logging_steps=3),
        dict(log_completions=1),
        dict(eval_strategy="steps", eval_steps=2),
    ],
    ids=str,
)
def test_a_run_that_fails_and_is_resumed_has_every_row_once(tmp_path, fields):
    if "eval_strategy" in fields:
        fields = {**fields, "kwargs": {"eval_dataset": training.dataset((3, 4))}}
    made(tmp_path / "whole", **fields).train()
    broken = made(tmp_path / "broken", **fields)
    broken.add_callback(At(4, fails))
    with pytest.raises(Exception, match="away"):
        broken.train()
    assert state_of(tmp_path / "broken") == "failed"
    made(tmp_path / "broken", **fields).train(resume_from_checkpoint=True)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    assert state_of(tmp_path / "broken") == "finished"
    assert len(RunFolder(tmp_path / "broken").environment["sessions"]) == 2


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_rows_after_an_older_checkpoint_are_made_anew(tmp_path, checkpoint):
    made(tmp_path).train()
    expected = rows_of(tmp_path)
    made(tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert rows_of(tmp_path) == expected
    [resume] = [event for event in RunFolder(tmp_path).events().rows if event["kind"] == "resume"]
    assert resume["frames_cut"] == 6 - checkpoint and resume["step"] == checkpoint


def test_a_longer_run_has_one_summary_at_its_end(tmp_path):
    made(tmp_path / "whole", max_steps=6).train()
    made(tmp_path / "two", max_steps=4).train()
    made(tmp_path / "two").train(resume_from_checkpoint=True)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "whole")
    assert ["train_runtime" in row for row in RunFolder(tmp_path / "two").metrics().rows] == [False] * 6 + [True]


def test_a_new_run_moves_the_record_of_an_older_one_aside(tmp_path):
    made(tmp_path, max_steps=1).train()
    before = rows_of(tmp_path)
    (tmp_path / "votes.jsonl").write_text("{}\n")
    made(tmp_path, max_steps=2).train()
    assert rows_of(tmp_path / "earlier" / "1") == before and (tmp_path / "earlier/1/votes.jsonl").is_file()
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 2] and not (tmp_path / "votes.jsonl").exists()
    assert kinds_of(tmp_path)[:2] == ["start", "record"]


def test_a_users_own_run_file_is_not_touched(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.2  # mine\n")
    for _ in range(2):
        made(tmp_path, max_steps=1).train()
    assert (tmp_path / "run.yaml").read_text() == "beta: 0.2  # mine\n"
    assert yaml.safe_load((tmp_path / "run.resolved.yaml").read_text())["max_steps"] == 1
    assert not (tmp_path / "earlier/1/run.yaml").exists() and (tmp_path / "earlier/1/run.resolved.yaml").is_file()


def test_what_a_user_changes_in_our_run_file_stays(tmp_path):
    made(tmp_path, max_steps=1).train()
    changed = (tmp_path / "run.yaml").read_text() + "beta: 0.2\n"
    (tmp_path / "run.yaml").write_text(changed)
    made(tmp_path, max_steps=1).train()
    assert (tmp_path / "run.yaml").read_text() == changed and (tmp_path / "run.resolved.yaml").is_file()


def test_a_run_that_is_resumed_into_another_folder_has_all_its_metrics(tmp_path):
    made(tmp_path / "first").train()
    made(tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-4"))
    assert rows_of(tmp_path / "second")[0] == rows_of(tmp_path / "first")[0]
    assert [group["step"] for group in rows_of(tmp_path / "second")[1]] == [5, 5, 6, 6]


def test_a_run_whose_record_is_damaged_goes_on_and_says_so(tmp_path):
    made(tmp_path, max_steps=4).train()
    lines = (tmp_path / METRICS).read_bytes().split(b"\n")
    (tmp_path / METRICS).write_bytes(b"\n".join([lines[0], b"\xff\0{", *lines[2:]]))
    [file] = completions_files(tmp_path)
    frames = (tmp_path / file.name).read_bytes()
    (tmp_path / file.name).write_bytes(b"XXXX" + frames[4:])
    (tmp_path / "environment.json").write_text("{")
    made(tmp_path).train(resume_from_checkpoint=True)
    [damaged] = [event["damaged"] for event in RunFolder(tmp_path).events().rows if "damaged" in event]
    assert damaged == [METRICS, file.name]
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 3, 4, 5, 6]


def test_a_run_whose_record_is_gone_goes_on_with_the_metrics_of_its_checkpoint(tmp_path):
    made(tmp_path, max_steps=4).train()
    for path in tmp_path.glob("*.json*"):
        path.unlink() if path.name not in ("config.json", "generation_config.json") else None
    made(tmp_path).train(resume_from_checkpoint=True)
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stops_says_so(tmp_path, number, code):
    trainer = made(tmp_path)
    trainer.add_callback(At(3, lambda: signal.raise_signal(number)))
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    *_, stop, saved, end = [event for event in RunFolder(tmp_path).events().rows if event["kind"] != "idle"]
    assert (stop["kind"], stop["signal"], stop["step"]) == ("stop", number.name, 4)
    assert (saved["name"], end["code"], end["state"]) == ("checkpoint-4", code, "stopped")


def test_a_run_that_is_killed_is_lost_and_resumes_to_every_row_once(tmp_path):
    made(tmp_path / "whole").train()
    folder = tmp_path / "killed"

    def killed():
        trainer = made(folder)
        trainer.add_callback(At(5, lambda: signal.raise_signal(signal.SIGKILL)))
        trainer.train()

    assert killed_runs.forked(killed) == -signal.SIGKILL
    assert state_of(folder) == "lost"
    assert killed_runs.forked(lambda: made(folder).train(resume_from_checkpoint=True)) == 0
    assert rows_of(folder) == rows_of(tmp_path / "whole") and state_of(folder) == "finished"


def test_while_a_run_goes_on_it_is_running(tmp_path):
    states = []
    trainer = made(tmp_path)
    trainer.add_callback(At(2, lambda: states.append(state_of(tmp_path))))
    trainer.train()
    assert states == ["running"]


def test_files_are_rotated_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.runs.completions.LARGEST_FILE", 1500)
    monkeypatch.setattr("online_dpo.training.recording.MEGABYTE", 2500)
    made(tmp_path / "whole", log_completions_max_mb=1).train()
    sizes = [(tmp_path / "whole" / file.name).stat().st_size for file in completions_files(tmp_path / "whole")]
    assert sum(sizes) <= 2500 and len(sizes) >= 2
    told = [event for event in RunFolder(tmp_path / "whole").events().rows if event["kind"] == "record"]
    assert told and told[0]["files"][0] == "completions-r0-00000.jsonl.zst"


def test_a_rotated_record_is_cut_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.runs.completions.LARGEST_FILE", 900)
    made(tmp_path).train()
    expected, files = rows_of(tmp_path), completions_files(tmp_path)
    assert len(files) > 3
    made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rows_of(tmp_path) == expected and completions_files(tmp_path) == files


def test_a_full_disk_for_a_while_loses_nothing_and_ends_nothing(tmp_path):
    made(tmp_path / "whole", save_strategy="no").train()
    folder = tmp_path / "full"

    def run():
        with Path(os.devnull).open("w") as nothing:
            sys.stdout = sys.stderr = nothing  # pytest's are files, which are limited as well
            trainer = made(folder, save_strategy="no")
            trainer.add_callback(At(2, lambda: killed_runs.limit_file_size(100)))
            trainer.add_callback(At(4, lambda: killed_runs.limit_file_size(2**40)))
            trainer.train()

    assert killed_runs.forked(run) == 0
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    told = [event["message"] for event in RunFolder(folder).events().rows if event["kind"] == "record"]
    assert len(told) == 2 and "could not be written" in told[0] and "can be written again" in told[1]


def test_warnings_and_failures_of_scorers_are_events(tmp_path):
    def reward(completions, **_):
        return [float("nan"), *training.word_reward(completions)[1:]]

    made(tmp_path, reward_funcs=reward, max_steps=2).train()
    told = [event for event in RunFolder(tmp_path).events().rows if event["kind"] == "failure"]
    assert told and told[0]["source"] == "Reward `reward`" and sum(event["times"] for event in told) == 2


def test_events_of_other_threads_are_written(tmp_path):
    from online_dpo.runs import events

    def emits():
        threads = [threading.Thread(target=events.emit, args=("retry", f"{n}")) for n in range(20)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]

    trainer = made(tmp_path, max_steps=1)
    trainer.add_callback(At(1, emits))
    trainer.train()
    told = [event["message"] for event in RunFolder(tmp_path).events().rows if event["kind"] == "retry"]
    assert sorted(told, key=int) == [str(n) for n in range(20)]


def test_the_settings_are_yaml_and_the_environment_is_json(tmp_path):
    made(tmp_path, max_steps=1).train()
    assert (tmp_path / "run.yaml").read_text().startswith("# Written by online-dpo ")
    json.loads((tmp_path / "environment.json").read_text())


def test_a_checkpoint_may_have_any_name(tmp_path):
    made(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_cannot_be_resumed_leaves_the_record_of_the_one_before(tmp_path):
    trainer = made(tmp_path, max_steps=2)
    trainer.train()
    before = (tmp_path / "events.jsonl").read_bytes()
    with pytest.raises(CheckpointError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "no-such-folder"))
    assert (tmp_path / "events.jsonl").read_bytes() == before and state_of(tmp_path) == "finished"


REWARD = "def words(completions, **_):\n    return [float(len(text)) for text in completions]\n"


def test_the_command_writes_no_run_folder_over_files_of_another_program(tmp_path, capsys):
    path = run_files.write_run_file(run_files.fill_folder(tmp_path, REWARD), reward_funcs=["feedback.py:words"])
    assert run_files.trainer_of(path).args.run_folder is True
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / METRICS).write_text("step,loss\n")
    assert run_files.trainer_of(path).args.run_folder is False
    assert f"warning: no run folder is written. {tmp_path / 'out' / METRICS} is not" in capsys.readouterr().err
    path = run_files.write_run_file(tmp_path, reward_funcs=["feedback.py:words"], run_folder=True)
    with pytest.raises(ForeignFileError, match="set `run_folder: false`"):
        run_files.trainer_of(path)
    path = run_files.write_run_file(tmp_path, reward_funcs=["feedback.py:words"], run_folder=False)
    run_files.trainer_of(path).train()
    assert (tmp_path / "out" / METRICS).read_text() == "step,loss\n" and not (tmp_path / "out/events.jsonl").exists()


def test_a_disk_that_stays_full_ends_no_run_and_what_is_lost_is_told(tmp_path):
    def run():
        with Path(os.devnull).open("w") as nothing:
            sys.stdout = sys.stderr = nothing
            told = []
            handler = logging.Handler()
            handler.emit = lambda record: told.append(record.getMessage())
            logging.getLogger("online_dpo").addHandler(handler)
            trainer = made(tmp_path, save_strategy="no")
            trainer.add_callback(At(2, lambda: killed_runs.limit_file_size(100)))
            trainer.train()
            assert trainer.state.global_step == 6
            assert sum("It waits in memory" in text for text in told) == 1
            assert any("rows and frames of the record could not be written" in text for text in told)

    assert killed_runs.forked(run) == 0
    assert [row["step"] for row in RunFolder(tmp_path).metrics().rows] == [1]


def test_a_callback_may_log_beside_each_log(tmp_path):
    callback = LogsMore()
    callback.trainer = made(tmp_path, max_steps=2, kwargs=dict(callbacks=[callback]))
    callback.trainer.train()
    rows = [row for row in RunFolder(tmp_path).metrics().rows if "train_runtime" not in row]
    assert [(row["step"], "loss" in row, row.get("mine")) for row in rows] == [
        (1, True, None),
        (1, False, 1.0),
        (2, True, None),
        (2, False, 2.0),
    ]
