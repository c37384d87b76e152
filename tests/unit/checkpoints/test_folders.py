"""A folder named as a checkpoint is whole at all times, wherever a process is killed between two operations."""

import os
import shutil

import pytest

from online_dpo.checkpoints.files import replacing, write_text
from online_dpo.checkpoints.folders import (
    aside_of,
    checkpoints_in,
    put_in_place,
    recover,
    remove,
)
from online_dpo.checkpoints.manifest import Manifest, problem_of


class Killed(BaseException):
    pass


class KilledAt:
    """Ends what runs before its n-th change of the disk: a rename, or the deletion of a folder or of a file."""

    def __init__(self, monkeypatch, number):
        self.left = number
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, call):
        def counted(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*args, **kwargs)

        return counted


def each_kill(monkeypatch, prepare, act):
    """Yields after each kill of ``act``, and at last after it has ended."""
    number, ended = 0, False
    while not ended:
        prepare()
        with monkeypatch.context() as patched:
            KilledAt(patched, number)
            try:
                act()
                ended = True
            except Killed:
                number += 1
        yield ended
    assert number > 2


def test_replacing_a_checkpoint_leaves_the_old_one_or_the_new(tmp_path, make_checkpoint, monkeypatch):
    run_dir = tmp_path / "run"
    final, seen = run_dir / "checkpoint-3", set()

    def prepare():
        shutil.rmtree(run_dir, ignore_errors=True)
        make_checkpoint(3, folder=final, sequence=1)
        make_checkpoint(3, folder=aside_of(final), sequence=2, extra={"new": True})

    for _ in each_kill(monkeypatch, prepare, lambda: put_in_place(final)):
        assert all(problem_of(path) is None for path in run_dir.glob("checkpoint-*"))
        assert checkpoints_in(run_dir) == [final]
        had_name = final.is_dir()
        recover(run_dir)
        assert os.listdir(run_dir) == ["checkpoint-3"] and problem_of(final) is None
        is_new = "new" in Manifest.read(final).extra
        assert is_new or had_name
        seen.add((had_name, is_new))
    assert seen == {(True, False), (False, True), (True, True)}


def test_a_removal_leaves_no_torn_checkpoint(tmp_path, make_checkpoint, monkeypatch):
    run_dir = tmp_path / "run"

    def prepare():
        shutil.rmtree(run_dir, ignore_errors=True)
        for step in (1, 2):
            make_checkpoint(step, folder=run_dir / f"checkpoint-{step}")

    for _ in each_kill(monkeypatch, prepare, lambda: remove(run_dir / "checkpoint-1")):
        assert all(problem_of(path) is None for path in run_dir.glob("checkpoint-*"))
        recover(run_dir)
        assert set(os.listdir(run_dir)) <= {"checkpoint-1", "checkpoint-2"}
    assert os.listdir(run_dir) == ["checkpoint-2"]


def test_a_torn_one_aside_is_deleted_and_the_earlier_stays(tmp_path, make_checkpoint):
    old = make_checkpoint(3)
    torn = make_checkpoint(3, folder=aside_of(old))
    (torn / "optimizer.pt").unlink()
    (tmp_path / "notes.txt").touch()
    recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "notes.txt"] and problem_of(old) is None


def test_folders_aside_are_not_named_as_transformers_names_checkpoints(tmp_path):
    from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

    aside_of(tmp_path / "checkpoint-3").mkdir(parents=True)
    (tmp_path / ".checkpoint-2.removed").mkdir()
    assert get_last_checkpoint(tmp_path) is None and sort_checkpoints(str(tmp_path)) == []


def test_a_file_is_the_old_one_or_the_new(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old")
    with pytest.raises(Killed), replacing(path) as aside:
        aside.write_text("ne")
        raise Killed
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["state.json"]
    write_text(path, "new")
    assert path.read_text() == "new"
