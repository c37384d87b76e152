"""Memory runs out on one of two real processes: both make the step again, with the same weights, and none waits."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.processes import environment
from support.ranks import RANKS
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from memory_worker import NEVER, cases  # noqa: E402

WORKER = Path(__file__).with_name("memory_worker.py")
WAYS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OF_CI = "fsdp2"
"""The way that CI tries; the others take minutes each."""


def runs(ends):
    """The cases that end the run, or those after which it goes on."""
    marks = {way: () if way == OF_CI else pytest.mark.slow for way in WAYS}
    chosen = [(way, case) for way in WAYS for case in cases(way) if (case in NEVER) == ends]
    return [pytest.param(way, case, marks=marks[way], id=f"{way}-{case[0]}: {case[1]}") for way, case in chosen]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @functools.cache
    def of(way):
        out = tmp_path_factory.mktemp(way)
        own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
        own["PYTHONPATH"] += os.pathsep + str(WORKER.parent)
        command = [*RANKS, str(WORKER), str(out), way]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]

    return of


@pytest.mark.parametrize(("way", "case"), runs(ends=False))
def test_weights_and_logs_are_those_of_a_run_with_room(results, way, case):
    run, spent = case
    both = [of_rank[run, str(spent)] for of_rank in results(way)]
    for rank, (got, of_rank) in enumerate(zip(both, results(way), strict=True)):
        expected = of_rank[run, "undisturbed"]
        assert got["raised"] == (rank in spent.ranks) and got["error"] is None
        assert_same(got["weights"], expected["weights"], 1e-5)
        assert all(torch.equal(weight, both[0]["weights"][name]) for name, weight in got["weights"].items())
        assert [log.keys() for log in got["logs"]] == [log.keys() for log in expected["logs"]]
        for ours, theirs in zip(got["logs"], expected["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=3e-5, abs=1e-6)
        assert got["passes"] > expected["passes"]
    assert both[0]["tokens_that_fit"] == both[1]["tokens_that_fit"] < 1000


@pytest.mark.parametrize(("way", "case"), runs(ends=True))
def test_where_nothing_can_be_split_all_ranks_end_with_the_same_line_and_the_steps_done_are_saved(results, way, case):
    first, second = (of_rank[case[0], str(case[1])] for of_rank in results(way))
    assert first["error"] == second["error"] and first["error"].startswith("A pass of 1 pair(s)")
    assert "\n" not in first["error"] and first["step"] == second["step"]
    assert first["checkpoints"] == second["checkpoints"] == [f"checkpoint-{first['step']}"] * (first["step"] > 0)
