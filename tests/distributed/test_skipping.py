"""Two processes, one of which has nothing to do, or fails, where all come together: neither waits for the other."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from support.processes import environment
from support.ranks import RANKS

WORKER = Path(__file__).with_name("skipping_worker.py")
LOST = "FeedbackLostError: Another process of this run failed; its error says why."


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    out = tmp_path_factory.mktemp("skipping")
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run([*RANKS, str(WORKER), str(out)], env=own, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]

    def of(case):
        ends = [json.loads((out / f"{case} {rank}.json").read_text()) for rank in (0, 1)]
        assert all(end["seconds"] < 100 for end in ends)  # less than `ddp_timeout`
        return ends

    return of


def test_a_rank_without_prompts_takes_part_in_an_evaluation(ends):
    first, last = ends("an evaluation without prompts")
    assert first["error"] is None and first["step"] == last["step"] == 2
    assert [log["step"] for log in first["metrics"]] == [1, 2]
    assert [log["eval_loss"] for log in first["metrics"]] == [log["eval_loss"] for log in last["metrics"]]
    assert "EVALUATION 2" in first["calls"] and "EVALUATION 0" in last["calls"]


def test_a_rank_without_prompts_takes_part_in_the_check_of_the_first_weights(ends):
    """Where the run begins with an evaluation, or with a step."""
    for case in ("an evaluation first", "a step without prompts"):
        first, last = ends(case)
        assert first["error"] is last["error"] is None
        assert "SYNC_CHECK 2" in first["calls"] and "SYNC_CHECK 0" in last["calls"]
    first, last = ends("an evaluation first")
    assert first["metrics"]["eval_win_rate"] == last["metrics"]["eval_win_rate"]


@pytest.mark.parametrize(
    ("case", "error", "step"),
    [
        ("an unknown token in an evaluation", "UnknownTokenError: .* has token 1000000", 1),
        ("unreadable prompts of an evaluation", "ForeignCodeError: .* a row that cannot be read", 1),
        ("an unknown token", "UnknownTokenError: .* has token 1000000", 0),
        ("unreadable prompts", "ForeignCodeError: .* a row that cannot be read", 0),
        ("an engine that fails", "ForeignCodeError: Engine `TogetherEngine` raised .* the device is gone", 0),
        ("a reward that fails", "ScoringError: Reward function .* the reward is away", 0),
        ("an engine that fails in the check", "ConnectionError: the device is gone", 0),
        ("an engine that fails in an evaluation", "ForeignCodeError: Engine .* the device is gone", 1),
    ],
)
def test_what_fails_on_one_rank_before_all_come_together_ends_both(ends, case, error, step):
    first, last = ends(case)
    assert first["error"] == LOST and first["step"] == last["step"] == step
    assert re.search(error, last["error"]), last["error"]
