"""Frames of completions are rotated, and wait where they cannot be written."""

import random
import shutil

from online_dpo.runs.directory import RunDirectory
from online_dpo.runs.reading import RunFolder

TEXT = 1500


def groups(step):
    """The groups of a step, which take about `TEXT` bytes when they are compressed."""
    return [{"step": step, "text": random.Random(step).randbytes(TEXT).hex()}]


def steps_in(folder):
    run = RunFolder(folder)
    return [row["step"] for frame in run.all_frames() for row in run.groups(frame)]


def test_files_are_rotated_and_the_oldest_go(tmp_path):
    directory = RunDirectory(tmp_path, rank=0, processes=1, limit=4 * TEXT)
    for step in range(1, 10):
        directory.add_groups(groups(step))
    kept = steps_in(tmp_path)
    assert kept == list(range(10 - len(kept), 10)) and 3 <= len(kept) <= 6
    assert sum(path.stat().st_size for path in tmp_path.glob("completions-*")) <= 4 * TEXT


def test_no_frame_is_lost_where_the_next_file_cannot_be_opened(tmp_path):
    directory = RunDirectory(tmp_path, rank=0, processes=1, limit=20 * TEXT)
    (tmp_path / "completions-r0-00001.jsonl.zst").mkdir()
    for step in range(1, 10):
        directory.add_groups(groups(step))
    assert steps_in(tmp_path) == [*range(1, 10)] and not directory.waiting


def test_frames_wait_until_their_first_file_can_be_made(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    directory = RunDirectory(folder, rank=0, processes=1, limit=100 * TEXT)
    shutil.rmtree(folder)
    folder.touch()  # so that no folder can be made there
    directory.add_groups(groups(1))
    assert directory.waiting >= 1
    folder.unlink()
    directory.add_groups(groups(2))
    assert steps_in(folder) == [1, 2]
