"""vLLM samples for sharded trainers of two ranks as for one process (architecture, invariant 15)."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import vllm_tools
from support.processes import environment
from support.training import assert_same
from support.vllm_training import check

sys.path.insert(0, str(Path(__file__).parent))
from sharded_trainers_worker import CASES, WAYS, run  # noqa: E402

WORKER = Path(__file__).with_name("sharded_trainers_worker.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory, server, adapter_server):
    """The runs of two ranks, and for each case that of one process: with the same server, by other ways to it."""
    out = tmp_path_factory.mktemp("sharded")
    own = vllm_tools.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    one = {lora: run(server.url, "", out / f"one-{lora}", transfer="http", lora=lora) for lora in (False, True)}
    done = subprocess.run(
        [*torchrun, str(WORKER), str(out), server.url, adapter_server.url, ",".join(CASES)],
        env=environment(**own, DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]

    def load(way, case):
        two = [torch.load(out / f"{way}-{case}-{rank}.pt") for rank in range(2)]
        return one[CASES[case].get("lora", False)], two

    return load


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_completions_and_weights_are_those_of_one_process(results, way, case):
    one, two = results(way, case)
    check(two[0]["log"], steps=3)  # what sampled had the latest weights
    sampled = [set().union(*calls) for calls in zip(*(rank["completions"] for rank in two), strict=True)]
    assert sampled == one["completions"]
    for rank in two:
        assert rank["sharded"] and rank["checked"] == one["checked"] == 2
        assert rank["names"] == one["names"]
        for weights, expected in zip(rank["weights"], one["weights"], strict=True):
            assert_same(weights, expected, 1e-5)
        for before, after in itertools.pairwise(rank["weights"]):
            assert all((after[name] - before[name]).abs().max() > 1e-5 for name in before)
    assert bool(two[0].get("forgot")) == CASES[case].get("forgets", False)
