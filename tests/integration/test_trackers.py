"""What lands in each tracker, read back from its own files: metrics, histograms, pairs; and a resumed run in the same
run. Nothing leaves the machine.
"""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from online_dpo.training.display.figures import evaluation_prefix
from support import training
from support.processes import environment

SCRIPT = """
import sys
from support import training

folder, tracker, resume = sys.argv[1:]
made = training.trainer(
    folder, kwargs={"eval_dataset": training.dataset((3, 4))}, num_completions=3, max_steps=3, logging_steps=1,
    eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1, report_to=tracker, run_name=None,
)
if resume != "no":
    made.train(resume_from_checkpoint=folder + "/checkpoint-2")
else:
    made.train()
"""


def run(folder, tracker, own, resume="no", **variables):
    """A run in a process of its own, with the tracker's files below ``folder``; returns its log."""
    own = environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", **own, **variables)
    command = [sys.executable, "-c", SCRIPT, str(folder / "run"), tracker, resume]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    return state["log_history"], done.stderr


def of_steps(history):
    """The logs of steps, by step, and those of evaluations."""
    steps = {log["step"]: log for log in history if not evaluation_prefix(log) and "train_runtime" not in log}
    return steps, {log["step"]: log for log in history if evaluation_prefix(log)}


def same(got, expected):
    return got == pytest.approx(expected, rel=1e-5) or (math.isnan(got) and math.isnan(expected))


def assert_all_metrics(found, history):
    """``found`` has by step the metrics under the names of the log."""
    steps, evaluations = of_steps(history)
    assert len(steps) == 3 and list(evaluations) == [2, 3]
    for logs in (steps, evaluations):
        for step, log in logs.items():
            wrong = [n for n, value in log.items() if n != "step" and not same(found[step].get(n, math.nan), value)]
            assert not wrong, (step, wrong, {name: (found[step].get(name), log[name]) for name in wrong})


DISTRIBUTIONS = {"length", "score", "token_log_ratio", "reward/word_reward", "margin", "implied_margin"}


def from_wandb(name):
    """The name in the log of a metric as W&B, Trackio and TensorBoard have it."""
    return "eval_" + name.removeprefix("eval/") if name.startswith("eval/") else name.removeprefix("train/")


@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history, _ = run(tmp_path, "tensorboard", {})
    [folder] = (tmp_path / "run" / "runs").iterdir()

    def read():
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
        events.Reload()
        found = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault(event.step, {})[from_wandb(tag)] = event.value
        return events, found

    events, found = read()
    assert_all_metrics(found, history)
    assert {tag.removeprefix("samples/") for tag in events.Tags()["histograms"]} == DISTRIBUTIONS
    steps, _ = of_steps(history)
    for event in events.Histograms("samples/length"):
        of_histogram = event.histogram_value
        assert of_histogram.sum / of_histogram.num == pytest.approx(steps[event.step]["completions/mean_length"])
    tables = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("samples/pairs/text_summary")]
    assert len(tables) == 3 and all(table.startswith("| step | group | prompt | chosen |") for table in tables)
    assert all("word&#95;reward" in line for line in tables[0].splitlines()[2:])

    history, _ = run(tmp_path, "tensorboard", {}, resume="yes")
    assert [folder] == list((tmp_path / "run" / "runs").iterdir())
    events, found = read()
    assert_all_metrics(found, history)
    assert [event.step for event in events.Scalars("train/objective/kl")] == [1, 2, 3]  # that of step 3 once


def messages(data):
    """The messages in a file of W&B's, which is a log of LevelDB's behind a header: blocks of 32 KiB, in them parts of
    messages with a head of checksum (4 bytes), length (2) and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    at, message = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def nested(items):
    """A row of history, whose histograms and tables are written entry by entry."""
    row = {}
    for item in items:
        *path, name = item.nested_key or [item.key]
        into = row
        for part in path:
            into = into.setdefault(part, {})
        into[name] = json.loads(item.value_json)
    return row


def wandb_records(folder):
    """The history of each offline run in a folder, from the files that would be sent, by the run's id."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        rows = []
        for message in messages(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            if record.WhichOneof("record_type") == "history":
                rows.append(nested(record.history.item))
        found.setdefault(path.stem.removeprefix("run-"), []).append(rows)
    return found


@pytest.mark.slow
def test_wandb(tmp_path):
    pytest.importorskip("wandb")
    own = dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    history, _ = run(tmp_path, "wandb", own)
    [(run_id, [rows])] = wandb_records(tmp_path).items()
    found, samples = {}, {}
    for row in rows:
        into = samples if any(name.startswith("samples/") for name in row) else found
        into.setdefault(row["train/global_step"], {}).update({from_wandb(name): v for name, v in row.items()})
    assert_all_metrics(found, history)
    assert list(samples) == [1, 2, 3]
    for shown in samples.values():
        assert {n.removeprefix("samples/") for n in shown if n.startswith("samples/")} >= {*DISTRIBUTIONS, "pairs"}
        assert shown["samples/score"]["_type"] == "histogram" and sum(shown["samples/score"]["values"]) == 12
        table = shown["samples/pairs"]
        assert table["_type"] == "table-file" and table["ncols"] == 9
        [path] = tmp_path.glob("wandb/offline-run-*/files/" + table["path"])
        content = json.loads(path.read_text())
        assert content["columns"][2:5] == ["prompt", "chosen", "rejected"] and content["data"][0][2]
    run(tmp_path, "wandb", own, resume="yes")
    assert [run_id] == list(wandb_records(tmp_path)), "the same run, in another file"
    assert len(wandb_records(tmp_path)[run_id]) == 2


def trackio_logs(variables):
    """The name and the logs of each run, read by a process of its own, as Trackio reads its folder once."""
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage as S
print(json.dumps([[name, S.get_logs("huggingface", name)] for name in S.get_runs("huggingface")], default=str))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    own = dict(TRACKIO_DIR=str(tmp_path / "trackio"))
    history, _ = run(tmp_path, "trackio", own)

    [[name, rows]] = trackio_logs(environment(**own))
    found, samples = {}, {}
    for row in rows:
        into = samples if any(key.startswith("samples/") for key in row) else found
        into.setdefault(row["train/global_step"], {}).update({from_wandb(key): v for key, v in row.items()})
    assert_all_metrics(found, history)
    assert list(samples) == [1, 2, 3]
    for shown in samples.values():
        assert sum(shown["samples/score"]["values"]) == 12 and shown["samples/score"]["_type"] == "trackio.histogram"
        assert shown["samples/pairs"]["_type"] == "trackio.table"
        assert shown["samples/pairs"]["_value"][0]["prompt"]
    run(tmp_path, "trackio", own, resume="yes")
    [[again, rows]] = trackio_logs(environment(**own))
    assert again == name and sum("train/loss" in row for row in rows) == 4, "steps 1, 2, 3, and 3 again"


@pytest.mark.slow
def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    import mlflow

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    own = dict(MLFLOW_TRACKING_URI=address)
    history, _ = run(tmp_path, "mlflow", own)
    client = mlflow.MlflowClient(address)

    def read():
        [experiment] = client.search_experiments()
        return client.search_runs([experiment.experiment_id])

    [tracked] = read()
    found = {}
    for name in tracked.data.metrics:
        for metric in client.get_metric_history(tracked.info.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    assert_all_metrics(found, history)
    tables = client.list_artifacts(tracked.info.run_id, "samples/pairs")
    assert [table.path for table in tables] == [f"samples/pairs/step-00000{step}.json" for step in (1, 2, 3)]
    table = json.loads(Path(client.download_artifacts(tracked.info.run_id, tables[0].path)).read_text())
    assert table["columns"][2:5] == ["prompt", "chosen", "rejected"] and table["data"]
    run(tmp_path, "mlflow", own, resume="yes")
    [again] = read()
    assert again.info.run_id == tracked.info.run_id and again.info.status == "FINISHED"


FAILS = """
import sys
from support import training

def away(completions, trainer_state, **_):
    if trainer_state.global_step == 2:
        raise ConnectionError("away")
    return training.word_reward(completions)

training.trainer(sys.argv[1], reward_funcs=away, max_steps=3, report_to=["mlflow", "trackio"]).train()
"""


@pytest.mark.slow
def test_a_run_that_fails_is_told_as_failed_and_its_steps_are_there(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    address, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "trackio"
    own = environment(MLFLOW_TRACKING_URI=address, TRACKIO_DIR=str(folder), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", FAILS, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "ScoringError" in done.stderr
    client = mlflow.MlflowClient(address)
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "objective/kl")] == [1, 2]
    [(_, rows)] = trackio_logs(own)
    assert sum("train/objective/kl" in row for row in rows) == 2


def test_a_number_limits_the_pairs_and_off_shows_none(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for amount, rows in ((1, 1), ("off", 0)):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / str(amount)))
        made = training.trainer(tmp_path / "run", num_completions=3, report_to="tensorboard", log_completions=amount)
        made.train()
        events = EventAccumulator(str(tmp_path / str(amount)))
        events.Reload()
        tags = events.Tags()
        assert "train/objective/kl" in tags["scalars"] and bool(tags["histograms"]) == bool(rows)
        tables = events.Tensors("samples/pairs/text_summary") if rows else []
        assert sum(len(t.tensor_proto.string_val[0].decode().splitlines()) - 2 for t in tables) == rows
