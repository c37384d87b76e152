"""`online-dpo ray` on a cluster of two nodes, with processes that train on CPUs and sample by themselves."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from online_dpo.cli.main import main
from support.hub import make_hub
from support.processes import environment
from support.ray_clusters import QUIET, cluster, fill, finished, running, start, weights

RAY = {"train_workers": 2, "placement_timeout": 60}


@pytest.fixture(scope="module")
def nodes():
    with cluster(cpus=[1, 1]) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    fill(folder, ray=RAY)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The weights that torchrun's processes end with."""
    out = folder / "torchrun"
    words = ["-m", "online_dpo", "train", str(folder / "run.yaml"), "--output_dir", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words],
        env=environment(**QUIET),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return weights(out)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_nothing_is_left(folder):
    until = time.monotonic() + 120
    while (left := running("online_dpo", str(folder))) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


def test_a_run_that_loses_a_process_and_a_worker_of_ray_ends_with_torchruns_weights(nodes, folder, undisturbed):
    for name in ("kill-trainer", "kill-worker"):
        (folder / f"wanted-{name}").touch()
    out = folder / "disturbed"
    code, output, errors = finished(start(folder / "run.yaml", nodes.address, "--output_dir", out))
    assert code == 0, errors
    assert (folder / "done-kill-trainer").exists() and (folder / "done-kill-worker").exists()
    assert "was killed by SIGKILL. All ranks are started again (1 of 3), from checkpoint-" in errors
    assert "is lost: " in errors and "All ranks are started again (2 of 3), from checkpoint-" in errors
    assert f"Model saved in {out}" in output and "step 8/8" in output
    assert_equal(weights(out), undisturbed)
    assert {path.name for path in (out / "ray").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert_nothing_is_left(folder)


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_from_which_the_command_that_is_shown_resumes(nodes, folder, undisturbed):
    out = folder / "stopped"
    (folder / "wanted-terminate").touch()
    run = start(folder / "run.yaml", nodes.address, "--output_dir", out)
    (folder / "command.pid").write_text(str(run.pid))
    code, _, errors = finished(run)
    assert code == 128 + signal.SIGTERM, errors
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    words = f"online-dpo ray {folder / 'run.yaml'} --ray.address {nodes.address} --output_dir {out}"
    assert f"Resume with: {words} --resume_from_checkpoint {checkpoint}" in errors
    assert_nothing_is_left(folder)
    resumed = start(folder / "run.yaml", nodes.address, "--output_dir", out, "--resume_from_checkpoint", checkpoint)
    code, _, errors = finished(resumed)
    assert code == 0, errors
    assert_equal(weights(out), undisturbed)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--ray.train_gpus", 8, "--ray.train_workers", 0],
            "Wanted: 8 GPUs and 8 CPUs (8 trainers with 1 GPU and 1 CPU each). The cluster has no GPU and 2 CPUs on 2 "
            "nodes. Lacking: 8 GPUs and 6 CPUs.",
        ),
        (
            ["--ray.train_workers", 1, "--ray.cpus_per_trainer", 2],
            "Wanted: 2 CPUs (1 trainer with 2 CPUs). The cluster has no GPU and 2 CPUs on 2 nodes. Lacking: a node "
            "with 2 CPUs free at once: what is free lies on several nodes.",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_told_within_the_time_limit(words, message, nodes, folder):
    began = time.monotonic()
    code, _, errors = finished(start(folder / "run.yaml", nodes.address, *words, "--ray.placement_timeout", 3))
    assert code == 2
    assert message in errors and "`ray.placement_timeout`" in errors
    assert time.monotonic() - began < 280


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_not_started_again(nodes, folder):
    broken = folder / "broken.py"
    broken.write_text("def score(prompts, completions):\n    raise RuntimeError('no score today')\n")
    words = ["--reward_funcs", f"{broken}:score", "--output_dir", folder / "failed"]
    code, _, errors = finished(start(folder / "run.yaml", nodes.address, *words))
    assert code == 1
    assert "no score today" in errors and "started again" not in errors


def test_no_cluster_is_an_error_in_one_line(folder):
    code, _, errors = finished(start(folder / "run.yaml", "127.0.0.1:1"))
    assert code == 2
    assert "error: No Ray cluster could be joined at 127.0.0.1:1" in errors


def test_the_command_needs_ray(folder, tmp_path):
    code = (
        "import importlib.util, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
        f"from online_dpo.cli.main import main\nsys.exit(main(['ray', {str(folder / 'run.yaml')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: Ray is not installed here. Install it with: pip install 'online-dpo[ray]'" in done.stderr


def test_the_recipe_for_two_machines(nodes, tmp_path, monkeypatch):
    """Two processes without a GPU and without servers stand for its twelve and four."""
    names = ("Qwen/Qwen2.5-7B-Instruct", "Skywork/Skywork-Reward-V2-Qwen3-0.6B", "trl-lib/ultrafeedback-prompt")
    for name, value in make_hub(tmp_path / "hub", *names).items():
        monkeypatch.setenv(name, value)
    assert main(["init", "ray", "--to", str(tmp_path)]) == 0
    less = ("--ray.train_gpus", 0, "--ray.train_workers", 2, "--ray.servers", 0, "--max_staleness", 0)
    small = ("--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 2, "--save_strategy", "no")
    short = ("--gradient_accumulation_steps", 1, "--max_new_tokens", 8, "--max_length", 128, "--use_cpu", "true")
    out = tmp_path / "out"
    run = start(tmp_path / "ray.yaml", nodes.address, *less, *small, *short, "--output_dir", out)
    code, output, errors = finished(run)
    assert code == 0, errors
    assert "FSDP2 over 2 processes" in output and "step 2/2" in output
    assert (out / "model.safetensors").is_file()
