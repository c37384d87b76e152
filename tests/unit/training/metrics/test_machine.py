"""Figures of speed, memory and the GPU."""

import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.gpu import GpuWatch, NvmlReader, Reading, gpu_reader
from online_dpo.training.metrics.machine import Machine
from online_dpo.training.metrics.memory import memory_figures
from online_dpo.training.metrics.speed import peak_teraflops, speed_figures

CPU = torch.device("cpu")


def test_figures_per_second_by_hand():
    totals = {"flops": 6e12, "trained_tokens": 900.0, "completion_tokens": 600.0, "loss": 0.5}
    times = {"time/rollout": 3.0, "time/scoring": 1.5, "time/training": 4.5, "time/reference": 1.0}
    figures = speed_figures({**totals, **times}, seconds=10.0, peak=6.0)
    assert figures == {
        **times,
        "loss": 0.5,
        "time/all": 10.0,
        "time/share/rollout": 0.3,
        "time/share/scoring": 0.15,
        "time/share/training": 0.45,
        "time/share/other": pytest.approx(0.1),
        "perf/tokens_per_second": 60.0,
        "perf/rollout_tokens_per_second": 200.0,
        "perf/scoring_tokens_per_second": 400.0,
        "perf/training_tokens_per_second": 200.0,
        "perf/teraflops": 0.6,
        "perf/mfu": pytest.approx(0.1),
    }


def test_what_is_not_known_is_absent_and_phases_that_overlap_leave_nothing():
    figures = speed_figures({"time/rollout": 8.0, "time/training": 9.0}, seconds=10.0, peak=None)
    assert figures["time/share/other"] == 0.0 and figures["perf/tokens_per_second"] == 0.0
    assert not {"perf/mfu", "perf/teraflops", "perf/scoring_tokens_per_second"} & set(figures)
    assert "perf/mfu" not in speed_figures({"flops": 1.0}, 1.0, None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_of_devices(name, peak):
    assert peak_teraflops(name) == peak


def test_memory_of_this_process():
    figures = memory_figures(CPU)
    assert figures["perf/host_memory"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.1)
    assert figures["perf/host_memory_peak"] >= figures["perf/host_memory"] > 0.05
    assert set(figures) == {"perf/host_memory", "perf/host_memory_peak"}


class FakeLibrary:
    """Stands in for nvidia-ml-py's module `pynvml`, with what is called of it."""

    class NVMLError(Exception):
        pass

    def __init__(self, busy=(50, 70)):
        self.busy, self.opened = list(busy), []

    def nvmlInit(self):
        self.opened.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle):
        if not self.busy:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=self.busy.pop(0), memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 * 2**30, used=(10 + len(self.busy)) * 2**30)


def test_the_fake_has_the_names_of_the_library():
    pynvml = pytest.importorskip("pynvml")
    for name in ("NVMLError", *(n for n in vars(FakeLibrary) if n.startswith("nvml"))):
        assert hasattr(pynvml, name)


def test_a_reader_asks_for_the_gpu_by_its_uuid():
    library = FakeLibrary()
    reader = NvmlReader(library, "GPU-1")
    assert library.opened == ["init", "GPU-1"]
    assert [reader.read(), reader.read()] == [Reading(50.0, 11 * 2**30), Reading(70.0, 10 * 2**30)]
    assert reader.read() is None  # as of a part of a GPU


def test_a_gpu_is_read_while_training_runs_and_no_longer():
    library = FakeLibrary(busy=[10, 20, 60])
    store = MetricStore()
    machine = Machine(store, CPU)
    machine.gpu = GpuWatch(NvmlReader(library, "GPU-1"), seconds=0.001)
    with machine.gpu.watching():
        while library.busy:
            time.sleep(0.001)
        time.sleep(0.01)
    machine.record()
    log = store.drain()
    assert log["perf/gpu_utilization"] == pytest.approx(30.0) and log["perf/gpu_memory"] == 12.0
    machine.record()
    assert not {"perf/gpu_utilization", "perf/gpu_memory"} & set(store.drain())


def test_a_machine_without_a_gpu_has_no_figures_of_one():
    assert gpu_reader(CPU) is None
    store = MetricStore()
    machine = Machine(store, CPU)
    with machine.gpu.watching():
        machine.record()
    assert set(store.drain()) == {"perf/host_memory", "perf/host_memory_peak"}
