"""`online-dpo ray` on a cluster of two nodes with a real vLLM server on CPUs."""

import os

import pytest
import torch

from support import vllm_tools
from support.ray_clusters import cluster, fill, finished, running, start, weights

SERVE = ["--dtype", "float32", "--max-model-len", 128, "--", "--enforce-eager", "--block-size", vllm_tools.BLOCK]
RAY = {"train_workers": 2, "servers": 1, "placement_timeout": 20, "server_args": SERVE}


@pytest.fixture(scope="module")
def nodes():
    os.environ.update(vllm_tools.ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    with cluster(cpus=[1, 2]) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    fill(folder, ray=RAY)
    return folder


def train(folder, nodes, name):
    code, output, errors = finished(start(folder / "run.yaml", nodes.address, "--output_dir", folder / name), 400)
    assert code == 0, errors
    assert f"Model saved in {folder / name}" in output
    return errors


def test_a_run_that_loses_a_process_and_then_its_server_ends_with_the_undisturbed_runs_weights(nodes, folder):
    undisturbed = train(folder, nodes, "undisturbed")
    assert "started again" not in undisturbed
    for name in ("kill-trainer", "kill-server"):
        (folder / f"wanted-{name}").touch()
    errors = train(folder, nodes, "disturbed")
    assert "rank 1" in errors and "was killed by SIGKILL. All ranks are started again (1 of 3)" in errors
    assert "ray: server 0 was killed by SIGKILL. It is started again (1 of 3)" in errors
    assert "ray: server 0 is ready again at http://" in errors
    expected, found = weights(folder / "undisturbed"), weights(folder / "disturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not running("online_dpo", str(folder)) and not running("vllm.entrypoints", str(folder))


@pytest.mark.slow
def test_a_server_that_cannot_start_is_told_with_the_end_of_its_log(nodes, folder):
    words = ["--output_dir", folder / "wrong", "--ray.server_args", "[--max-model-len, 128, --, --no-such-option]"]
    code, _, errors = finished(start(folder / "run.yaml", nodes.address, *words))
    assert code == 2
    assert "error: The vLLM server 0 has ended with exit code 2 before it was ready." in errors
    assert "no-such-option" in errors.partition("ends with:")[2]
