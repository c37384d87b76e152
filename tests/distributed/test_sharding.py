"""Every way of sharding in two real processes against one whole process (architecture, invariant 15)."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import quantized
from support.processes import environment
from support.ranks import RANKS
from support.recorded import assert_together_those_of_one
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from exports import MODELS  # noqa: E402
from sharding_worker import CASES, CASES_IN_BF16, CASES_OF_MODELS, CASES_OF_QLORA, WHOLE, fitting  # noqa: E402

WORKER = Path(__file__).with_name("sharding_worker.py")
WAYS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PARTS_OF_OTHERS = ("zero1", "zero2")
"""Ways that CI leaves out: what they do is a part of what ZeRO-3 does."""


def of_ways(*cases):
    """Parametrises by the way of sharding, and what else the cases have."""
    marks = {way: pytest.mark.slow if way in PARTS_OF_OTHERS else () for way in WAYS}
    names = ("way", "case")[: len(cases[0])]
    return pytest.mark.parametrize(names, [pytest.param(*case, marks=marks[case[0]]) for case in cases])


RUNS = [(way, case) for way in WAYS for case in (*CASES, *CASES_OF_MODELS, *CASES_OF_QLORA) if fitting(way, case)]
MANY_PASSES = {"plain": 2, "accumulated": 1, "one pass": 1}
"""Passes that the largest micro-batch of a case has at least."""


@pytest.fixture(scope="module")
def load(request, tmp_path_factory):
    asked = {item.callspec.params["way"] for item in request.session.items if item.path == request.path}
    ways = [way for way in WAYS if way in asked | {"ddp"}]  # others are compared with it
    out = tmp_path_factory.mktemp("sharding")
    quantized.base_folder(out / "base")
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    commands = [([sys.executable], "1", "none"), (RANKS, "2", ",".join(ways))]
    running = [
        subprocess.Popen(
            [*command, str(WORKER), str(out), count, tried],
            env=own,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, count, tried in commands
    ]
    for process in running:
        _, said = process.communicate(timeout=1200)
        assert process.returncode == 0, said[-6000:]

    return lambda processes, way, case: [
        torch.load(out / f"{way}-{case}-of-{processes}-rank-{rank}.pt") for rank in range(processes)
    ]


@pytest.fixture
def results(load):
    return lambda way, case: (load(1, "none", case)[0], load(2, way, case))


@of_ways(*RUNS)
def test_weights_are_those_of_one_process(results, way, case):
    one, two = results(way, case)
    for rank in two:
        assert_same(rank["weights"], one["weights"], 1e-5)
        assert all(torch.equal(rank["weights"][name], two[0]["weights"][name]) for name in rank["weights"])


@of_ways(*(run for run in RUNS if run[1] != "not finite"))
def test_metrics_and_evaluations_are_those_of_one_process(results, way, case):
    one, two = results(way, case)
    assert len(one["logs"]) == len(two[0]["logs"]) >= 2
    for expected, got in zip(one["logs"], two[0]["logs"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for rank in two:
        assert rank.get("eval") == (pytest.approx(one["eval"], rel=1e-5, abs=1e-6) if "eval" in one else None)
    assert one["logs"][-1]["objective/kl"] != 0


@of_ways(*((way,) for way in WAYS))
def test_records_of_groups_are_those_of_one_process(results, way):
    one, two = results(way, "plain")
    assert_together_those_of_one([rank["rows"] for rank in two], one["rows"])


@pytest.mark.parametrize("case", MANY_PASSES)
@of_ways(*((way,) for way in WAYS))
def test_cases_have_one_to_three_passes_in_a_micro_batch(results, way, case):
    passes = results(way, case)[1][0]["passes"]
    assert max(passes) >= MANY_PASSES[case] and set(passes) <= {1, 2, 3}


@of_ways(*((way,) for way in WAYS))
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(results, way):
    one, two = results(way, "not finite")
    for run in (one, *two):
        first, poisoned, last = run["changed"]
        assert first and poisoned == [] and last
    for rank in two:
        assert [log["guard/skipped_steps"] for log in rank["logs"]] == [0, 1, 1]
        assert not math.isfinite(rank["logs"][1]["grad_norm"]) and math.isfinite(rank["logs"][2]["grad_norm"])


@of_ways(*((way,) for way in WAYS))
def test_the_norm_is_that_of_the_whole_gradient_before_it_is_clipped(results, way):
    one, two = results(way, "clipped")
    norms = [log["grad_norm"] for log in one["logs"]]
    assert [log["grad_norm"] for log in two[0]["logs"]] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1  # each was clipped


@of_ways(*((way, case) for way in WAYS for case in CASES_IN_BF16 if fitting(way, case)))
def test_in_bf16_policy_and_reference_agree_before_the_first_step(load, way, case):
    """Log-probabilities are not rounded to bf16 on the way, nor the reference's buffers: KL would not be 0."""
    of_ddp, logs = (load(2, name, case)[0]["logs"] for name in ("ddp", way))
    assert logs[0]["objective/kl"] == 0 and logs[1]["objective/kl"] != 0
    for expected, got in zip(of_ddp, logs, strict=True):
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)
        assert got["logps/chosen"] == pytest.approx(expected["logps/chosen"], abs=0.02)


@pytest.mark.parametrize("model", MODELS)
@of_ways(*((way,) for way in WAYS))
def test_what_vllm_gets_of_a_sharded_model_is_what_it_gets_of_the_whole_one(load, way, model):
    for rank, two in enumerate(load(2, way, "plain")):
        found = two["exports"][model]
        expected = found["expected"]
        assert found["sharded"] == (way not in WHOLE)
        for got in (found["weights"], found["written"], found.get("stopped", expected)):
            assert got.keys() == (expected.keys() if got is not found["written"] or rank == 0 else set())
            assert all(torch.equal(got[name], expected[name]) for name in got)
        sharded, whole = found.get("adapter", ({}, {}))
        assert sharded.keys() == whole.keys() and all(torch.equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("model", ["full", "experts"])
@of_ways(*((way,) for way in WAYS if way not in WHOLE))
def test_weights_are_gathered_one_at_a_time_or_layer_by_layer(load, way, model):
    for two in load(2, way, "plain"):
        most, size = two["exports"][model]["bytes"]
        assert 0 < most < size / 2
