"""`Machine`: what a log says of the machine that a run is on, and of its speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.gpu import GIB, GpuWatch, gpu_reader
from online_dpo.training.metrics.memory import memory_figures
from online_dpo.training.metrics.speed import device_peak, speed_figures


class Machine:
    """The memory, the devices and the speed of a run.

    Args:
        metrics: where its figures are recorded.
        device: that this process trains on.
    """

    def __init__(self, metrics: MetricStore, device: torch.device) -> None:
        self._metrics, self._device, self._peak = metrics, device, device_peak(device)
        self.gpu = GpuWatch(gpu_reader(device))

    def record(self) -> None:
        """Record memory and utilisation as they are now."""
        readings = self.gpu.drain()
        self._metrics.mean("perf/gpu_utilization", [reading.utilization for reading in readings])
        figures = memory_figures(self._device)
        if readings:
            figures["perf/gpu_memory"] = max(reading.memory for reading in readings) / GIB
        for name, value in figures.items():
            self._metrics.largest(name, torch.tensor(value, dtype=torch.float64))

    def figures(self, metrics: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Return the metrics of a log over all ranks, with the figures of speed."""
        return speed_figures(metrics, seconds, self._peak)
