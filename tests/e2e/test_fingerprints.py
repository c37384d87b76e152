"""`benchmarks/fingerprints.py` gives a run one fingerprint, also when it is resumed, and another run another one."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fingerprints  # noqa: E402


def hashes(*args):
    made = fingerprints.fingerprint(*args)
    assert [log["step"] for log in made["history"] if "prompts" in log] == [1, 2, 3, 4, 5, 6]
    return made["weights"], made["log"]


def test_a_run_has_one_fingerprint_and_another_seed_another(tmp_path):
    weights, log = hashes("stale", 0)
    fingerprints.save_half_way("stale", 0, tmp_path)
    assert hashes("stale", 0) == hashes("stale", 0, fingerprints.checkpoint_in(tmp_path)) == (weights, log)
    other_weights, other_log = hashes("stale", 1)
    assert other_weights != weights and other_log != log


def test_a_difference_is_named():
    def made(*losses):
        return {"history": [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]}

    assert fingerprints.first_difference(made(0.5, 0.25), made(0.5, 0.125)) == "step 2: loss was 0.25, is 0.125"
