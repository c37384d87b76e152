"""Memory runs out on one of two real processes: both make the step again, with the same gradient, and none waits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.processes import environment
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from memory_worker import CASES, NEVER  # noqa: E402

WORKER = Path(__file__).with_name("memory_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory")
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29523"]
    done = subprocess.run([*torchrun, str(WORKER), str(out)], env=own, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]


def named(case):
    return f"{case[0]}: {case[1]}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_gradient_weights_and_logs_are_those_of_a_run_with_room(results, case):
    run, spent = case
    for rank, of_rank in enumerate(results):
        got, expected = of_rank[run, str(spent)], of_rank[run, "undisturbed"]
        assert got["raised"] == (rank in spent.ranks) and got["error"] is None
        assert_same(got["gradient"], expected["gradient"], 1e-5)
        assert_same(got["weights"], expected["weights"], 1e-5)
        assert all(
            torch.equal(got["weights"][n], weight) for n, weight in results[0][run, str(spent)]["weights"].items()
        )
        assert [log.keys() for log in got["logs"]] == [log.keys() for log in expected["logs"]]
        for ours, theirs in zip(got["logs"], expected["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    first, second = (of_rank[run, str(spent)] for of_rank in results)
    assert first["passes"] > results[0][run, "undisturbed"]["passes"]
    assert first["tokens_that_fit"] == second["tokens_that_fit"] < 1000


@pytest.mark.parametrize("case", NEVER, ids=named)
def test_where_nothing_can_be_split_all_ranks_end_with_the_same_line_and_the_steps_done_are_saved(results, case):
    first, second = (of_rank[case[0], str(case[1])] for of_rank in results)
    assert first["error"] == second["error"] and first["error"].startswith("A pass of 1 pair(s)")
    assert "\n" not in first["error"] and first["step"] == second["step"]
    assert first["checkpoints"] == second["checkpoints"] == [f"checkpoint-{first['step']}"] * (first["step"] > 0)
