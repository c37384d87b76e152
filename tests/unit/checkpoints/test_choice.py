"""Which checkpoint a run goes on from: the newest whole one, or the named one if it is whole and has all it needs."""

import json

import pytest

from online_dpo.checkpoints.choice import newest_whole, none_found, problem_of_named, warning_of_named
from online_dpo.checkpoints.folders import aside_of
from online_dpo.checkpoints.needed import Needs

PLAIN = Needs({}, 1)


def passed_over(choice):
    return {folder.name: problem for folder, problem in choice.passed_over}


def test_the_newest_whole_one_and_why_not_a_newer(tmp_path, make_checkpoint):
    make_checkpoint(2), make_checkpoint(4)
    (make_checkpoint(6) / "optimizer.pt").unlink()
    (make_checkpoint(10) / "manifest.json").unlink()
    choice = newest_whole(tmp_path, PLAIN)
    assert choice.folder == tmp_path / "checkpoint-4"
    assert passed_over(choice) == {
        "checkpoint-10": "it has no manifest.json, so nothing says that it is whole; to resume from it anyway, give "
        "its folder",
        "checkpoint-6": "optimizer.pt is missing",
    }
    assert choice.reasons.endswith("; not from checkpoint-6: optimizer.pt is missing")


def test_older_ones_are_not_looked_at(tmp_path, make_checkpoint):
    make_checkpoint(1, manifest=False)
    (make_checkpoint(2) / "optimizer.pt").unlink()
    make_checkpoint(3)
    assert newest_whole(tmp_path, PLAIN).passed_over == ()


def test_what_was_written_last_is_newer_than_a_higher_step(tmp_path, make_checkpoint):
    """A run was resumed from step 2 and has saved step 3 since."""
    make_checkpoint(2, sequence=1), make_checkpoint(4, sequence=2), make_checkpoint(3, sequence=3)
    assert newest_whole(tmp_path, PLAIN).folder == tmp_path / "checkpoint-3"


def test_steps_are_numbers(tmp_path, make_checkpoint):
    make_checkpoint(9), make_checkpoint(10)
    assert newest_whole(tmp_path, PLAIN).folder.name == "checkpoint-10"


def test_nothing_to_resume_from(tmp_path, make_checkpoint):
    assert none_found(tmp_path, newest_whole(tmp_path / "none", PLAIN)).startswith(f"{tmp_path} holds no checkpoint.")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / ".checkpoint-8.partial" / "checkpoint-8").mkdir(parents=True)
    assert newest_whole(tmp_path, PLAIN).passed_over == ()
    (tmp_path / "checkpoint-7").touch()
    assert passed_over(newest_whole(tmp_path, PLAIN)) == {"checkpoint-7": "it is no folder"}
    (tmp_path / "checkpoint-7").unlink()
    (make_checkpoint(3) / "model.safetensors").write_text("cut")
    choice = newest_whole(tmp_path, PLAIN)
    assert choice.folder is None
    assert none_found(tmp_path, choice) == (
        f"{tmp_path} holds no checkpoint to resume from: not from checkpoint-3: model.safetensors has 3 bytes, not the "
        "12 that were written."
    )


def test_one_that_was_just_replacing_another_counts(tmp_path, make_checkpoint):
    make_checkpoint(1)
    make_checkpoint(2, folder=aside_of(tmp_path / "checkpoint-2"))
    make_checkpoint(2, folder=tmp_path / ".checkpoint-2.removed")
    make_checkpoint(3, folder=aside_of(tmp_path / "checkpoint-3"))
    assert newest_whole(tmp_path, PLAIN).folder == tmp_path / "checkpoint-2"
    assert problem_of_named(tmp_path / "checkpoint-2", PLAIN) is None
    assert problem_of_named(tmp_path / "checkpoint-3", PLAIN) == f"there is no folder {tmp_path / 'checkpoint-3'}."


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("name", "needs", "problem"),
    [
        ("optimizer.pt", PLAIN, "optimizer.pt is missing: the optimizer's state (with `save_only_model` a checkpoint"),
        ("scheduler.pt", PLAIN, "scheduler.pt is missing: the state of the learning rate's schedule"),
        ("rng_state.pth", PLAIN, "rng_state.pth is missing: the random state of process 0"),
        ("model.safetensors", PLAIN, "model.safetensors is missing: the weights"),
        ("", Needs({"target_kl": 3.0}, 1), "beta.json is missing: beta, which `target_kl` adapts"),
        ("", Needs({"sync_ref_model": True}, 1), "reference.safetensors is missing: the reference, which"),
        ("", Needs({"max_staleness": 1}, 1), "lookahead-0.json is missing: the completions that"),
    ],
)
def test_what_the_options_need_must_be_there(make_checkpoint, name, needs, problem, manifest):
    """With a manifest too: other options may have written it."""
    folder = make_checkpoint(3, without=(name,), manifest=manifest)
    assert problem_of_named(folder, needs).startswith(f"{folder} cannot be resumed from: {problem}")


@pytest.mark.parametrize("state", ["", "{", "[]", '{"global_step": null}', "[" * 20_000])
def test_a_state_that_is_none_is_damaged(make_checkpoint, state):
    folder = make_checkpoint(3, manifest=False)
    (folder / "trainer_state.json").write_text(state)
    assert problem_of_named(folder, PLAIN) == f"{folder} cannot be resumed from: trainer_state.json is damaged."


@pytest.mark.parametrize("manifest", [True, False])
def test_another_number_of_processes_is_refused(tmp_path, make_checkpoint, manifest):
    two, one = make_checkpoint(2, world_size=2, manifest=manifest), make_checkpoint(1, manifest=manifest)
    assert problem_of_named(two, Needs({}, 2)) is None and problem_of_named(one, PLAIN) is None
    assert problem_of_named(two, PLAIN).startswith(
        f"{two} cannot be resumed from: 2 processes wrote it, and this run has 1 process; each process goes on"
    )
    assert problem_of_named(one, Needs({}, 2)).endswith("so start 1 process.")
    if manifest:
        assert newest_whole(tmp_path, PLAIN).folder == one


def test_a_named_one_without_a_manifest_is_taken_with_a_warning(make_checkpoint):
    older, ours = make_checkpoint(3, manifest=False), make_checkpoint(4)
    assert problem_of_named(older, PLAIN) is None and warning_of_named(ours) is None
    assert warning_of_named(older).startswith(f"{older} has no manifest.json: another program or an older version")


def test_shards_that_an_index_names_must_be_there(make_checkpoint):
    folder = make_checkpoint(3, manifest=False, without=("model.safetensors",))
    index = folder / "model.safetensors.index.json"
    names = {letter: f"model-0000{number}-of-00002.safetensors" for letter, number in (("a", 1), ("b", 2))}
    index.write_text(json.dumps({"weight_map": names}))
    (folder / "model-00001-of-00002.safetensors").touch()
    assert problem_of_named(folder, PLAIN) == (
        f"{folder} cannot be resumed from: model-00002-of-00002.safetensors is missing, which "
        "model.safetensors.index.json names."
    )
    index.write_text("{")
    assert problem_of_named(folder, PLAIN).endswith("model.safetensors.index.json is damaged.")


def test_the_runs_folder_in_the_place_of_a_checkpoint(tmp_path, make_checkpoint):
    make_checkpoint(2), make_checkpoint(10)
    assert problem_of_named(tmp_path, PLAIN) == (
        f"{tmp_path} is no checkpoint of a run (no trainer_state.json). It holds checkpoint-2, checkpoint-10: give one "
        "of them."
    )


@pytest.mark.parametrize("name", ["global_step4", "pytorch_model_fsdp_0"])
def test_shards_that_other_libraries_wrote_are_not_read(tmp_path, make_checkpoint, name):
    folder = make_checkpoint(4)
    (folder / name).mkdir()
    problem = problem_of_named(folder, PLAIN)
    assert problem is not None
    assert f"{name} is of DeepSpeed's or accelerate's own format, pickles that could run any code" in problem
