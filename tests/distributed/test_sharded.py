"""Log-probabilities and gradients of models under FSDP2 and DDP, in two real processes, against the bare model.

Every rank has other groups. Wrappers average gradients over ranks, so the whole gradient is the mean of what the bare
model gives for the groups of each rank, from padded rows, through all of its logits.
"""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups
from support.processes import environment
from support.ranks import RANKS
from support.training import assert_same

sys.path.insert(0, str(Path(__file__).parent))
from sharded_worker import CASES, groups, model, weighted  # noqa: E402

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run([*RANKS, str(WORKER), str(out)], env=own, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]


@functools.cache
def bare(name, rank):
    """Log-probabilities, entropies and gradient of the model without any wrapper."""
    made = model(name)
    got = row_logprobs(made, pack_groups(groups(rank), [], shared=False), chunked=False)
    weighted(got.token_logps_M).backward()
    gradient = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return got.token_logps_M.detach(), got.entropy_M, gradient


@pytest.mark.parametrize("case", CASES, ids=" / ".join)
def test_log_probabilities_are_those_of_the_bare_model(results, case):
    for rank in range(2):
        logps, entropy, _ = bare(case[0], rank)
        got = results[rank][case]
        torch.testing.assert_close(got["logps"], logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["without gradient"], logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["entropy"], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=" / ".join)
def test_gradient_is_the_mean_over_ranks(results, case):
    each = [bare(case[0], rank)[2] for rank in range(2)]
    expected = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    assert (each[0][list(expected)[0]] - each[1][list(expected)[0]]).norm() > 1e-3  # the ranks do differ
    for rank in range(2):
        assert_same(results[rank][case]["gradient"], expected, 1e-4)
