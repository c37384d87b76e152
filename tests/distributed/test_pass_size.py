"""The tokens of a pass are the same on two ranks whose devices have different room, and in a run that is resumed."""

import json
import subprocess
from pathlib import Path

from support.processes import environment
from support.ranks import RANKS

WORKER = Path(__file__).with_name("pass_size_worker.py")


def test_the_rank_with_the_least_room_decides(tmp_path):
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run([*RANKS, str(WORKER), str(tmp_path)], env=own, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["settled"]["tokens"] == second["settled"]["tokens"] < first["same room"]["tokens"]
    assert first["settled"]["passes"] == second["settled"]["passes"]
    assert first["resumed"]["tokens"] == second["resumed"]["tokens"] == first["settled"]["tokens"]
    assert abs(first["settled"]["loss"] - first["same room"]["loss"]) < 1e-5
