"""Old checkpoints go, but never the last one that is whole and finite, nor the best."""

import os

import pytest

from online_dpo.checkpoints.files import write_text
from online_dpo.checkpoints.folders import recover
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


def test_of_a_link_only_the_link_goes(tmp_path, make_checkpoint):
    for step in range(1, 4):
        make_checkpoint(step)
    os.rename(tmp_path / "checkpoint-1", tmp_path / "elsewhere")
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    inside = names(tmp_path / "elsewhere")
    rotate(tmp_path, 2, None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "elsewhere"]
    assert names(tmp_path / "elsewhere") == inside


@pytest.mark.parametrize("suffix", ["removed", "partial"])
def test_links_in_place_of_our_own_folders_are_not_followed(tmp_path, make_checkpoint, suffix):
    for step in range(1, 3):
        make_checkpoint(step)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/dear.txt").write_text("dear")
    (tmp_path / f".checkpoint-1.{suffix}").symlink_to(tmp_path / "elsewhere")
    recover(tmp_path)
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-2", "elsewhere"] and names(tmp_path / "elsewhere") == ["dear.txt"]


def test_a_link_in_place_of_a_file_aside_is_not_written_through(tmp_path):
    (tmp_path / "dear.txt").write_text("dear")
    (tmp_path / ".card.partial").symlink_to(tmp_path / "dear.txt")
    write_text(tmp_path / "card", "new")
    assert ((tmp_path / "card").read_text(), (tmp_path / "dear.txt").read_text()) == ("new", "dear")
    assert names(tmp_path) == ["card", "dear.txt"]


def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "private", "x")
        os.umask(0o002)
        write_text(tmp_path / "shared", "x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "shared")] == [0o600, 0o664]
