"""The index of a run: complete, incremental, and right after the run has cut its files."""

import json
import os

import numpy as np
import pytest
import run_folders

from online_dpo.dashboard.index.background import Background
from online_dpo.dashboard.index.points import decimated, points_of, smoothed
from online_dpo.dashboard.index.run_index import RunIndex
from online_dpo.runs.layout import METRICS
from online_dpo.runs.reading import RunFolder


@pytest.fixture
def indexed(tmp_path):
    """Makes an index of a folder."""
    made, background = [], Background()

    def index(folder):
        made.append(RunIndex(RunFolder(folder), tmp_path / f"{len(made)}.sqlite", background))
        return made[-1]

    yield index
    background.close()
    for index in made:
        index.close()


def steps_of(index, metric="loss"):
    assert index.refresh_metrics(10)
    with index.reading() as db:
        return points_of(db, metric)[:, 1].tolist()


def test_metrics_groups_and_questions_are_all_there(made, indexed):
    index = indexed(made / "judged")
    assert steps_of(index) == list(range(1, 31))
    assert index.refresh_samples(10) and index.progress.percent == 100
    rows = [row for at in RunFolder(made / "judged").all_frames() for row in RunFolder(made / "judged").groups(at)]
    with index.reading() as db:
        samples = db.execute("SELECT * FROM sample").fetchall()
        asked = db.execute("SELECT count(*) FROM judged").fetchone()[0]
    assert len(samples) == len(rows) == 60
    assert [sample["reason"] for sample in samples] == [row.get("reason") for row in rows]
    assert asked == sum(len(c["orders"]) for row in rows for c in row.get("comparisons", []))
    group = index.find_group("7-0-1-0")
    [row] = [row for row in rows if (row["step"], row["index"]) == (7, 1)]
    assert [completion.text for completion in group.completions] == [entry["text"] for entry in row["completions"]]


def test_what_a_live_run_adds_is_read_from_where_it_was_left(tmp_path, indexed):
    folder = run_folders.make(tmp_path / "live", 5, 10, seed=0, state="running")
    index = indexed(folder)
    assert steps_of(index) == [1, 2, 3, 4, 5]
    index.refresh_samples(10)
    for step in (6, 7):
        run_folders.append_step(folder, step, 10)
        assert steps_of(index) == list(range(1, step + 1))
        assert index.refresh_samples(10)
        assert index.find_group(f"{step}-0-1-0").step == step
    assert index.generation == 0


def test_after_a_resumed_run_has_cut_its_files_nothing_is_double_or_stale(tmp_path, indexed):
    folder = run_folders.make(tmp_path / "cut", 8, 16, seed=0, state="running")
    index = indexed(folder)
    steps_of(index)
    index.refresh_samples(10)
    kept = (folder / METRICS).read_bytes().splitlines(keepends=True)[:5]
    (folder / METRICS).write_bytes(b"".join(kept))
    completions = folder / "completions-r0-00000.jsonl.zst"
    frames = list(RunFolder(folder).all_frames())
    completions.write_bytes(completions.read_bytes()[: frames[4].frame.end])
    for step in range(6, 12):  # longer than before at the next look
        run_folders.append_step(folder, step, 12, seed=9)
    assert steps_of(index) == list(range(1, 12))
    index.refresh_samples(10)
    with index.reading() as db:
        found = [tuple(row) for row in db.execute("SELECT step, idx FROM sample ORDER BY step, idx")]
    assert found == [(step, place) for step in range(1, 12) for place in (0, 1)]
    assert index.generation > 0


def test_damaged_lines_are_left_out(tmp_path, indexed):
    folder = tmp_path / "damaged"
    folder.mkdir()
    rows = [
        b'{"step": 1, "loss": 0.5}',
        b"no json",
        b"[1]",
        b'{"step": "x", "loss": 1}',
        b'{"step": -1, "loss": 1}',
        b'{"step": 2, "loss": "high", "text": {"a": 1}}',
        b'{"step": 3, "loss": NaN}',
        b'{"step": 4, "loss": null}',
        b'{"step": true, "loss": 7}',
        b'{"step": 1e400, "loss": 7}',
        b"[" * 100_000,
        b'{"step": 5, "loss": 1e999}',
        b"\xff\xfe",
        b'{"step": 6, "loss": 0.25}',
        b'{"step": 7, "lo',
    ]
    (folder / METRICS).write_bytes(b"\n".join(rows))
    assert steps_of(indexed(folder)) == [1, 6]


def test_a_line_longer_than_what_is_read_at_once_is_left_out(tmp_path, indexed):
    folder = tmp_path / "long"
    folder.mkdir()
    long = json.dumps({"step": 2, "loss": 1.0, "x": "a" * (3 << 20)})
    (folder / METRICS).write_text(f'{{"step": 1, "loss": 1.0}}\n{long}\n{{"step": 3, "loss": 1.0}}\n')
    assert steps_of(indexed(folder)) == [1, 3]


def test_links_pipes_and_devices_are_not_read(tmp_path, indexed):
    folder, secret = tmp_path / "hostile", tmp_path / "secret.jsonl"
    folder.mkdir()
    secret.write_text('{"step": 1, "loss": 1.0}\n')
    (folder / METRICS).symlink_to(secret)
    (folder / "events.jsonl").symlink_to("/dev/zero")
    os.mkfifo(folder / "completions-r0-00000.jsonl.zst")
    index = indexed(folder)
    assert steps_of(index) == []
    index.refresh_samples(1)
    with index.reading() as db:
        assert db.execute("SELECT count(*) FROM event").fetchone()[0] == 0


def test_a_chart_keeps_every_extreme():
    values = np.zeros(50_000)
    values[31_234], values[4_321] = 9.0, -9.0
    points = np.stack([np.arange(50_000), np.arange(1, 50_001), values], axis=1).astype(np.float64)
    few = decimated(points, 500)
    assert len(few) <= 1002 and few[:, 2].max() == 9.0 and few[:, 2].min() == -9.0
    assert few[0, 1] == 1 and few[-1, 1] == 50_000 and (np.diff(few[:, 1]) > 0).all()
    assert len(decimated(points[:700], 500)) == 700
    flat = points * [1, 1, 0]
    assert len(decimated(flat, 500)) <= 502


def test_smoothing_is_an_exponential_moving_average():
    values = np.random.default_rng(0).normal(size=1234)
    points = np.stack([np.arange(1234), np.arange(1234), values], axis=1)
    for smoothing in (0.0, 0.3, 0.99):
        average, averages = values[0], []
        for value in values:
            average = smoothing * average + (1 - smoothing) * value
            averages.append(average)
        assert np.allclose(smoothed(points, smoothing)[:, 2], averages, rtol=1e-9, atol=1e-12)
