"""Two training processes with a sharded model: one engine each, in process or over a server."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import vllm_tools
from support.processes import environment

WORKER = Path(__file__).with_name("ranks_worker.py")


def run(out, where, transfer):
    own = vllm_tools.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(out), where, transfer],
        env=environment(**own),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("kind, transfer", [("colocate", "auto"), ("server", "file"), ("server", "broadcast")])
def test_each_rank_samples_its_prompts_from_the_whole_models_weights(kind, transfer, tmp_path, request):
    where = "colocate" if kind == "colocate" else request.getfixturevalue("server").url
    for rank, found in enumerate(run(tmp_path, where, transfer)):
        assert max(found["errors"]) < 1e-4
        assert set(found["versions"]) == {1, 2}
        assert found["rows"] == [2 * rank, 2 * rank + 1]
