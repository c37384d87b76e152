"""A model's files take the places of another model's: old or new, never mixed."""

import os
import shutil

import pytest

from online_dpo.checkpoints.model_files import finish_model, replacing_model
from online_dpo.errors import CheckpointError


class Killed(BaseException):
    pass


def write(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in model.items():
        (folder / name).write_text(text)


def save(folder, model):
    with replacing_model(folder) as aside:
        write(aside, model)


def model(version, config="config", shards=1):
    weights = {f"model-{i:05}-of-{shards:05}.safetensors": f"{version} {i}" for i in range(1, shards + 1)}
    weights |= {"model.safetensors.index.json": f"index of {version}"}
    weights = {"model.safetensors": version} if shards == 1 else weights
    return {"config.json": config, "tokenizer.json": "words", "training_args.bin": version, **weights}


ADAPTER = {"adapter_config.json": "adapter", "adapter_model.safetensors": "adapter"}


def loaded(folder):
    """What a loader would read, in the order in which it looks; ``None`` where it would fail."""
    files = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    if "adapter_config.json" in files:
        return {name: files.get(name) for name in ADAPTER}
    if "config.json" not in files:
        return None
    names = ["model.safetensors"] if "model.safetensors" in files else [n for n in sorted(files) if "model" in n]
    return {name: files[name] for name in ["config.json", *names]} if names else None


def as_loaded(tmp_path, model):
    write(tmp_path / "alone", model)
    result = loaded(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone")
    return result


@pytest.mark.parametrize(
    ("old", "new", "never_absent"),
    [
        ({}, model("new"), False),
        (model("old"), model("new"), True),
        (model("old", shards=3), model("new", shards=3), False),
        (model("old", shards=3), model("new"), False),
        (model("old"), model("new", shards=3), False),
        (model("old"), model("new", config="other"), False),
        (ADAPTER, model("new"), False),
        (ADAPTER, {**ADAPTER, "adapter_model.safetensors": "new"}, True),
    ],
    ids=["nothing", "weights", "shards", "fewer", "more", "config", "adapter", "adapters"],
)
def test_a_kill_anywhere_leaves_old_or_new_and_the_next_run_ends_it(tmp_path, monkeypatch, old, new, never_absent):
    expected = [as_loaded(tmp_path, old) if old else None, as_loaded(tmp_path, new)]
    run_dir, number, ended = tmp_path / "run", 0, False
    while not ended:
        shutil.rmtree(run_dir, ignore_errors=True)
        write(run_dir, old)
        with monkeypatch.context() as patched:
            killed_at(patched, number)
            try:
                save(run_dir, new)
                ended = True
            except Killed:
                number += 1
        found = loaded(run_dir)
        assert found in expected or (found is None and not never_absent), number
        was_new = found == expected[1]
        finish_model(run_dir)
        assert loaded(run_dir) == expected[1] or (loaded(run_dir) == expected[0] and not was_new)
        assert not (run_dir / ".model.partial").exists()
    assert number > 4 and loaded(run_dir) == expected[1]
    stays = {"training_args.bin": "new"} if "config.json" in new else {}
    assert {name: (run_dir / name).read_text() for name in stays} == stays


def killed_at(patched, number):
    """An error that nothing catches, before the n-th change of the disk; deleting what is aside fails as well then."""
    left = [number]

    def counted(call):
        def counting(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return counting

    patched.setattr(os, "fsync", lambda descriptor: None)  # hundreds of real ones take seconds
    for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "fsync"), (os, "mkdir")):
        patched.setattr(module, name, counted(getattr(module, name)))


def test_a_failed_save_changes_nothing_and_is_told(tmp_path):
    save(tmp_path, model("old"))
    said = "could not be saved in .*No space left.*What was there is as it was"
    with pytest.raises(CheckpointError, match=said), replacing_model(tmp_path) as aside:
        (aside / "config.json").write_text("half")
        raise OSError(28, "No space left on device")
    assert loaded(tmp_path) == as_loaded(tmp_path / "x", model("old")) and not (tmp_path / ".model.partial").exists()


def test_other_files_stay_and_an_adapter_may_stand_beside_its_base(tmp_path):
    write(tmp_path, {**model("base"), "notes.txt": "mine"})
    save(tmp_path, ADAPTER)
    assert (tmp_path / "model.safetensors").read_text() == "base" and (tmp_path / "notes.txt").read_text() == "mine"
    save(tmp_path, model("new", shards=2))
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "manifest.json").exists()
