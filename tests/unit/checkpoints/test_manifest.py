"""A manifest says whether every file of a checkpoint is as it was written."""

import json
import os

import pytest

from online_dpo.checkpoints import manifest as manifests
from online_dpo.checkpoints.manifest import Manifest, entries_of, files_in, manifest_of, model_problem_of, problem_of


@pytest.mark.smoke
def test_a_whole_checkpoint_has_no_problem_and_its_manifest_reads_back(make_checkpoint):
    folder = make_checkpoint(3, versions={"torch": "2.13"}, extra={"run": {"seed": 1, "rates": [0.1]}})
    assert problem_of(folder) is None
    read = Manifest.read(folder)
    assert (read.step, read.world_size, read.sequence, read.finite) == (3, 1, 3, True)
    assert read.extra == {"run": {"seed": 1, "rates": [0.1]}} and read.versions == {"torch": "2.13"}
    assert read.files == entries_of(folder, files_in(folder)) and "manifest.json" not in read.files


NAMES = ["guard.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


@pytest.mark.parametrize("name", NAMES)
def test_each_file_that_is_missing_cut_or_changed_is_named(make_checkpoint, name):
    for step, (spoil, says) in enumerate([(missing, "missing"), (cut, "bytes, not the"), (flipped, "other content")]):
        folder = make_checkpoint(step)
        spoil(folder / name)
        problem = problem_of(folder)
        assert problem.startswith(name) and says in problem


def missing(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flipped(path):
    """One bit, with the times of the file as they were."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_bit_that_flips_after_a_check_is_found_by_the_next(make_checkpoint):
    folder = make_checkpoint(1)
    assert problem_of(folder) is None
    flipped(folder / "model.safetensors")
    assert "model.safetensors has other content" in problem_of(folder)


def test_every_bit_of_the_manifest_counts(make_checkpoint):
    folder = make_checkpoint(1, extra={"run": "a"})
    content = (folder / "manifest.json").read_bytes()
    read = Manifest.read(folder)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        # a space that became another white space says the same
        assert manifest_of(folder) in (None, read), content[place - 20 : place + 20]
        if manifest_of(folder) is None:
            assert "manifest.json" in problem_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"sha256": 1}', "[" * 20_000])
def test_a_manifest_that_is_none_is_damaged(make_checkpoint, text):
    folder = make_checkpoint(1)
    (folder / "manifest.json").write_text(text)
    assert problem_of(folder) == "manifest.json is damaged"


def test_a_newer_format_is_told(make_checkpoint):
    folder = make_checkpoint(1)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert problem_of(folder) == "manifest.json has format 2, which this version of online-dpo does not know"


@pytest.mark.parametrize("name", ["scaler.pt", "beta.json", "lookahead-0.pt", "adapter_model.safetensors"])
def test_a_file_that_a_resumed_run_would_read_must_be_of_the_checkpoint(make_checkpoint, name):
    folder = make_checkpoint(1)
    (folder / name).touch()
    assert problem_of(folder) == f"{name} is not of this checkpoint: manifest.json does not name it"


def test_notes_and_files_of_callbacks_may_be_added(make_checkpoint):
    folder = make_checkpoint(1)
    (folder / "notes.txt").touch()
    (folder / "adapter").mkdir()
    assert problem_of(folder) is None


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(make_checkpoint):
    folder = make_checkpoint(1)
    (folder / "optimizer.pt").unlink()
    os.mkfifo(folder / "optimizer.pt")
    assert problem_of(folder) == "optimizer.pt is missing"


def test_a_model_in_a_checkpoint_is_whole_without_the_state_of_its_run(make_checkpoint):
    folder = make_checkpoint(1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "guard.json"):
        (folder / name).unlink()
    assert model_problem_of(folder) is None and problem_of(folder) is not None
    flipped(folder / "model.safetensors")
    assert model_problem_of(folder).startswith("model.safetensors has other content")
    (folder / "manifest.json").write_text("{")
    assert model_problem_of(folder) == "manifest.json is damaged"
    (folder / "manifest.json").unlink()
    assert model_problem_of(folder) is None


def test_files_in_folders_count(tmp_path):
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "adapter_model.safetensors").write_text("a")
    Manifest(1, 1, 1, entries_of(tmp_path, files_in(tmp_path))).write(tmp_path)
    assert problem_of(tmp_path) is None
    (tmp_path / "ref" / "adapter_model.safetensors").write_text("b")
    assert problem_of(tmp_path).startswith("ref/adapter_model.safetensors has other content")


def test_what_has_not_changed_is_read_once(make_checkpoint, monkeypatch):
    folder = make_checkpoint(1)
    assert problem_of(folder) is None
    monkeypatch.setattr(manifests.digest.__globals__["hashlib"], "file_digest", None)
    assert problem_of(folder) is None


def resealed(folder, edit):
    """The manifest with a change, and the hash that a stranger would give it."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    edit(content)
    (folder / "manifest.json").write_text(json.dumps({"sha256": manifests._hash_of(content), **content}))


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "a//b", "./x", "x/", "", ".", "..", "a/..", "../../" * 50]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_folder_is_refused(make_checkpoint, name):
    folder = make_checkpoint(1)
    resealed(folder, lambda content: content["files"].update({name: {"size": 1, "sha256": ""}}))
    assert "which is no file in this folder" in problem_of(folder) and "\n" not in problem_of(folder)
    assert manifest_of(folder) is None


@pytest.mark.parametrize("name", ["a", "a/b.c", "global_step2/x..pt", "...", "-x", "~"])
def test_usual_names_are_taken(make_checkpoint, name):
    folder = make_checkpoint(1)
    resealed(folder, lambda content: content["files"].update({name: {"size": 1, "sha256": ""}}))
    assert problem_of(folder) == f"{name} is missing"


@pytest.mark.parametrize(
    "values",
    [
        {"files": []},
        {"files": {"x": None}},
        {"files": {"x": {"size": "1", "sha256": ""}}},
        {"files": {"x": {"size": 1}}},
        {"step": "1"},
        {"world_size": 1.5},
        {"sequence": None},
        {"finite": 1},
        {"extra": []},
        {"format": [1]},
    ],
)
def test_a_manifest_of_other_types_is_damaged(make_checkpoint, values):
    folder = make_checkpoint(1)
    resealed(folder, lambda content: content.update(values))
    assert problem_of(folder) == "manifest.json is damaged" and manifest_of(folder) is None


def test_a_manifest_that_is_nested_deeply_or_too_long_is_damaged(make_checkpoint, monkeypatch):
    folder = make_checkpoint(1)
    (folder / "manifest.json").write_text('{"a":' * 100_000)
    assert problem_of(folder) == "manifest.json is damaged"
    monkeypatch.setattr(manifests, "LONGEST", 1000)
    (folder / "manifest.json").write_text('{"sha256": "' + "0" * 1000 + '"}')
    assert problem_of(folder) == "manifest.json is damaged"
