"""Seconds by phase of a training step, with the device's work awaited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from online_dpo.distributed.collectives import world_size
from online_dpo.training.metric_store import MetricStore


class Stopwatch:
    """Measures the seconds between entering and leaving it, until the device has done what it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":  # not the whole device, on which another thread may be capturing a graph
            torch.cuda.current_stream(self._device).synchronize()
        self.seconds = time.perf_counter() - self._start


class PhaseTimer:
    """Adds the seconds spent in each phase to the metric ``time/<phase>``, averaged over ranks.

    >>> with phase("sync"):
    ...     engine.sync(policy, version)
    """

    def __init__(self, metrics: MetricStore, device: torch.device) -> None:
        self._metrics, self._device = metrics, device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self.stopwatch() as watch:
            yield
        self.add(name, watch.seconds)

    def stopwatch(self) -> Stopwatch:
        """Returns a stopwatch for this device; what it measures is recorded by `add`."""
        return Stopwatch(self._device)

    def add(self, name: str, seconds: float) -> None:
        """Records seconds that were measured before, in another thread for example."""
        self._metrics.total(f"time/{name}", seconds / world_size())
