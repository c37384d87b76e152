"""A run that is killed anywhere in a save, or whose disk is full, resumes to what it would have been: invariant 13."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from online_dpo.checkpoints.manifest import problem_of
from online_dpo.errors import CheckpointError
from support import killed_runs, tiny, training

OPTIONS = dict(max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1, target_kl=1.0, max_staleness=1)
OPTIONS |= dict(per_device_train_batch_size=2, lr_scheduler_type="linear", disable_dropout=False)


FILES = {"README.md", "checkpoint-3", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
FILES |= {"tokenizer_config.json", "trainer_state.json", "training_args.bin"}


def run(folder, resume=None, prepare=lambda made: None, **fields):
    """A run to its end, as the command makes it."""
    model = tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)
    made = training.trainer(folder, model=model, **(OPTIONS | fields))
    prepare(made)
    made.train(resume_from_checkpoint=resume)
    made.save_model()
    made.save_state()
    made.create_model_card()
    return made


def outcome(folder):
    """The final weights and log of a run, without times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    logs = [training.without_times(log) for log in state["log_history"] if "loss" in log]
    return load_file(folder / "model.safetensors"), logs


def assert_equal(got, expected):
    assert got[0].keys() == expected[0].keys() and all(torch.equal(got[0][name], expected[0][name]) for name in got[0])
    assert got[1] == expected[1] and [log["step"] for log in got[1]] == list(range(1, len(got[1]) + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its outcome, and the names of all changes of the disk that it makes after it has begun."""
    folder = tmp_path_factory.mktemp("whole")
    changes = folder / "changes.txt"

    def counted():
        names = []
        out = folder / "out"
        run(out, prepare=lambda made: killed_runs.count_changes(out, lambda number, what: names.append(what)))
        changes.write_text("\n".join(names))

    assert killed_runs.forked(counted) == 0
    return outcome(folder / "out"), changes.read_text().splitlines()


def kill_and_resume(tmp_path, number, expected):
    folder = tmp_path / str(number)
    code = killed_runs.forked(lambda: run(folder, prepare=lambda made: killed_runs.kill_at(folder, number)))
    assert code == -signal.SIGKILL
    for path in folder.glob("checkpoint-*"):
        assert problem_of(path) is None, (number, path)
    assert killed_runs.forked(lambda: run(folder, resume="auto")) == 0
    assert_equal(outcome(folder), expected)
    # `checkpoint-2` is there still where the run was over when it was resumed, so that nothing rotated
    assert {path.name for path in folder.iterdir()} - {"checkpoint-2"} == FILES


def test_changes_of_the_disk_are_seen(whole):
    _, changes = whole
    text = "\n".join(changes)
    assert text.count("fsync") > 40 and "os.rename" in text and "manifest.json" in text and "README.md" in text
    assert len(changes) > 150


@pytest.mark.parametrize("share", [0.1, 0.45, 0.62, 0.97])
def test_a_run_that_is_killed_in_a_save_resumes_bit_for_bit(tmp_path, whole, share):
    expected, changes = whole
    kill_and_resume(tmp_path, int(len(changes) * share), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 1000, 5000, 20_000, 40_000])
def test_a_full_disk_ends_the_run_in_one_line_and_space_lets_it_go_on(tmp_path, whole, size, capfd):
    """A limit of file sizes from the second save on."""
    expected, _ = whole

    def fills(made):
        def full(args, state, control, **kwargs):
            if state.global_step == 1:
                killed_runs.limit_file_size(size)

        made.steps_done.on_pre_optimizer_step = full

    def failing():
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be saved in .*; |earlier checkpoints are as"):
            run(tmp_path, prepare=fills)

    assert killed_runs.forked(failing) == 0, capfd.readouterr().err
    assert os.listdir(tmp_path).count("checkpoint-1") == 1 and problem_of(tmp_path / "checkpoint-1") is None
    assert not list(tmp_path.glob(".checkpoint-*")) and not (tmp_path / "checkpoint-2").exists()
    assert killed_runs.forked(lambda: run(tmp_path, resume=True)) == 0
    assert_equal(outcome(tmp_path), expected)
