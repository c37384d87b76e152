"""The memory of this process and its device."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from online_dpo.stats.catalogue import Metric, describe

GIB = 2**30
DEVICE = "on a GPU"

describe(
    "Memory and devices",
    Metric(
        "perf/device_memory",
        "GiB",
        "memory of tensors on the device at the log, of the rank with most",
        "What stays between steps: weights, optimizer, what engines keep.",
        DEVICE,
    ),
    Metric(
        "perf/device_memory_peak",
        "GiB",
        "the most memory of tensors on a device so far, of the rank with most",
        "Near the size of the device, passes are split. Lower: raise `max_tokens_per_pass`.",
        DEVICE,
    ),
    Metric(
        "perf/host_memory",
        "GiB",
        "resident memory of the process at the log, of the rank with most",
        "Growing from log to log: something is kept (a reward function's list, a cache).",
    ),
    Metric(
        "perf/host_memory_peak",
        "GiB",
        "the most resident memory of a process so far, of the rank with most",
        "What a machine must have. Loading models usually needs it.",
    ),
)


def memory_figures(device: torch.device) -> dict[str, float]:
    """Return the memory in use, in GiB, by the names of metrics. Nothing waits for the device."""
    kilo = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    resident = psutil.Process().memory_info().rss
    peak = max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo)  # Linux updates it a little later
    figures = {"perf/host_memory": resident / GIB, "perf/host_memory_peak": peak / GIB}
    if device.type == "cuda":
        figures["perf/device_memory"] = torch.cuda.memory_allocated(device) / GIB
        figures["perf/device_memory_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    return figures
