"""Seconds, with the device's work awaited."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds between entering and leaving it, with all that a device was asked for in between."""

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
