"""Every way of sharding in two real processes against one whole process (docs/architecture.md, invariant 15)."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.processes import environment
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from sharding_worker import CASES, CASES_OF_MODELS, WHOLE  # noqa: E402

WORKER = Path(__file__).with_name("sharding_worker.py")
WAYS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
RUNS = [(way, case) for way in WAYS for case in (*CASES, *CASES_OF_MODELS) if case in CASES or way not in WHOLE]
MANY_PASSES = {"plain": 2, "accumulated": 1, "one pass": 1}
"""Passes that the largest micro-batch of a case has at least."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharding")
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29523"]
    commands = [([sys.executable], "1", "none"), (torchrun, "2", ",".join(WAYS))]
    running = [
        subprocess.Popen(
            [*command, str(WORKER), str(out), count, ways],
            env=own,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, count, ways in commands
    ]
    for process in running:
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said[-6000:]

    def load(way, case):
        one = torch.load(out / f"none-{case}-of-1-rank-0.pt")
        return one, [torch.load(out / f"{way}-{case}-of-2-rank-{rank}.pt") for rank in range(2)]

    return load


@pytest.mark.parametrize(("way", "case"), RUNS)
def test_weights_are_those_of_one_process(results, way, case):
    one, two = results(way, case)
    for rank in two:
        assert_same(rank["weights"], one["weights"], 1e-5)
        assert all(torch.equal(rank["weights"][name], two[0]["weights"][name]) for name in rank["weights"])


@pytest.mark.parametrize(("way", "case"), [run for run in RUNS if run[1] != "not finite"])
def test_metrics_and_evaluations_are_those_of_one_process(results, way, case):
    one, two = results(way, case)
    assert len(one["logs"]) == len(two[0]["logs"]) >= 2
    for expected, got in zip(one["logs"], two[0]["logs"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for rank in two:
        assert rank.get("eval") == (pytest.approx(one["eval"], rel=1e-5, abs=1e-6) if "eval" in one else None)
    assert one["logs"][-1]["objective/kl"] != 0


@pytest.mark.parametrize("case", MANY_PASSES)
@pytest.mark.parametrize("way", WAYS)
def test_cases_have_one_to_three_passes_in_a_micro_batch(results, way, case):
    passes = results(way, case)[1][0]["passes"]
    assert max(passes) >= MANY_PASSES[case] and set(passes) <= {1, 2, 3}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(results, way):
    one, two = results(way, "not finite")
    for run in (one, *two):
        first, poisoned, last = run["changed"]
        assert first and poisoned == [] and last
    for rank in two:
        assert [log["guard/skipped_steps"] for log in rank["logs"]] == [0, 1, 1]
        assert not math.isfinite(rank["logs"][1]["grad_norm"]) and math.isfinite(rank["logs"][2]["grad_norm"])


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_is_that_of_the_whole_gradient_before_it_is_clipped(results, way):
    one, two = results(way, "clipped")
    norms = [log["grad_norm"] for log in one["logs"]]
    assert [log["grad_norm"] for log in two[0]["logs"]] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1  # each was clipped
