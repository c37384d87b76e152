"""How busy the GPU is, read once a second through NVIDIA's management library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any, Protocol

import torch

from online_dpo.stats.catalogue import Metric, describe

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""Time between two readings. The library itself looks back over up to a second."""
GIB = 2**30
NVIDIA = "on an NVIDIA GPU"

describe(
    "Memory and devices",
    Metric(
        "perf/gpu_utilization",
        "%",
        "share of time in which a kernel ran, read once a second; mean over ranks",
        "Low: the GPU waits for the host, a judge or a server. High says only that it was never idle.",
        NVIDIA,
    ),
    Metric(
        "perf/gpu_memory",
        "GiB",
        "most memory in use on a GPU, by all processes, since the last log",
        "What `nvidia-smi` shows: tensors, CUDA itself, vLLM, and other people's programs.",
        NVIDIA,
    ),
)


@dataclass(frozen=True)
class Reading:
    """One reading: the share of time that the GPU was busy, in percent, and the bytes in use on it."""

    utilization: float
    memory: float


class GpuReader(Protocol):
    """Reads how busy a GPU is."""

    def read(self) -> Reading | None:
        """Return a reading; ``None`` where the GPU gives none."""
        ...


class NvmlReader:
    """Reads one GPU through NVIDIA's management library.

    Args:
        library: the module ``pynvml``, of the package nvidia-ml-py.
        uuid: of the GPU. Its number would be another one than torch's where CUDA_VISIBLE_DEVICES is set.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        library.nvmlInit()
        self._handle = library.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> Reading | None:
        """Return a reading; ``None`` where the GPU gives none, as a part of one (MIG) does."""
        try:
            busy = self._library.nvmlDeviceGetUtilizationRates(self._handle).gpu
            used = self._library.nvmlDeviceGetMemoryInfo(self._handle).used
        except self._library.NVMLError as error:
            logger.info("The GPU says nothing of its utilisation: %s", error)
            return None
        return Reading(float(busy), float(used))


def gpu_reader(device: torch.device) -> GpuReader | None:
    """Return a reader of a device; ``None`` if it is no GPU of NVIDIA's, or its library is not there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    import pynvml

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        return NvmlReader(pynvml, uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        logger.warning("`perf/gpu_utilization` is left out: NVIDIA's management library says: %s.", error)
        return None


class GpuWatch:
    """Reads a GPU once a second in a thread of its own, while training runs.

    Args:
        reader: ``None`` where there is nothing to read.
        seconds: between two readings.
    """

    def __init__(self, reader: GpuReader | None, seconds: float = SECONDS) -> None:
        self._reader, self._seconds = reader, seconds
        self._readings: list[Reading] = []
        self._lock = Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Reads inside this context."""
        if self._reader is None:
            yield
            return
        ended = Event()
        thread = Thread(target=self._watch, args=(self._reader, ended), name="gpu-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def drain(self) -> list[Reading]:
        """Return the readings since the last call."""
        with self._lock:
            readings, self._readings = self._readings, []
        return readings

    def _watch(self, reader: GpuReader, ended: Event) -> None:
        while not ended.wait(self._seconds):
            reading = reader.read()
            if reading is None:
                return
            with self._lock:
                self._readings.append(reading)
