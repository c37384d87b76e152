"""Old checkpoints go, but never the last one that is whole and finite, nor the best."""

import os

import pytest

from online_dpo.checkpoints.rotation import keep_only, rotate


def names(run_dir):
    return sorted(os.listdir(run_dir))


def test_those_that_were_written_first_go(tmp_path, make_checkpoint):
    """Steps 5 and 6 are of before the run was resumed from 2."""
    for sequence, step in enumerate([1, 2, 5, 6, 3, 4]):
        make_checkpoint(step, sequence=sequence)
    rotate(tmp_path, 3, None)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("limit", [None, 0, -1, 9])
def test_without_a_limit_all_stay(tmp_path, make_checkpoint, limit):
    make_checkpoint(1), make_checkpoint(2)
    rotate(tmp_path, limit, None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_the_best_stays_beside_the_newest(tmp_path, make_checkpoint):
    for step in range(1, 5):
        make_checkpoint(step)
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_best_one_in_another_folder_protects_none_of_this(tmp_path, make_checkpoint):
    for step in range(1, 4):
        make_checkpoint(step)
    (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
    rotate(tmp_path, 1, str(tmp_path / "other" / "checkpoint-1"))
    assert names(tmp_path) == ["checkpoint-3", "other"]


def test_the_last_finite_one_stays(tmp_path, make_checkpoint):
    make_checkpoint(1), make_checkpoint(2)
    (make_checkpoint(3) / "optimizer.pt").unlink()
    make_checkpoint(4, finite=False), make_checkpoint(5, finite=False)
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]


def test_damaged_and_foreign_ones_go_first(tmp_path, make_checkpoint):
    make_checkpoint(1), make_checkpoint(2)
    (make_checkpoint(7) / "manifest.json").write_text("{")
    make_checkpoint(8, manifest=False), make_checkpoint(3)
    rotate(tmp_path, 3, None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_one_that_cannot_be_removed_is_told(tmp_path, make_checkpoint, monkeypatch, caplog):
    make_checkpoint(1), make_checkpoint(2)

    def refused(source, target):
        raise PermissionError("no")

    monkeypatch.setattr(os, "rename", refused)
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and "could not be removed" in caplog.text


@pytest.mark.parametrize("spoiled", [False, True])
def test_all_but_the_best_go_at_the_end_if_the_best_is_whole(tmp_path, make_checkpoint, spoiled):
    make_checkpoint(1)
    best = make_checkpoint(2)
    make_checkpoint(3)
    if spoiled:
        (best / "model.safetensors").write_text("weightz of 2")
    keep_only(tmp_path, str(best))
    assert names(tmp_path) == (["checkpoint-1", "checkpoint-2", "checkpoint-3"] if spoiled else ["checkpoint-2"])
