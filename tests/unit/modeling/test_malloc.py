"""Memory that is freed stays with the process, shown by page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

from online_dpo.modeling.malloc import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
if sys.argv[1] == "train":
    from online_dpo import OnlineDPOConfig
    from online_dpo.training.build import train_on_one_device_per_process
    train_on_one_device_per_process(OnlineDPOConfig(output_dir="unused", use_cpu=True, report_to=[]))
def pass_over():
    tensors = [torch.ones(10_000_000) for _ in range(3)]  # 40 MB each: more than glibc ever keeps by itself
for _ in range(6):
    pass_over()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    pass_over()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], env=own, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_run_on_a_cpu_uses_freed_memory_again():
    assert faults("leave") > 100_000  # five times 120 MB in pages of 4 KiB are 146 000
    assert faults("train") < 500


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
