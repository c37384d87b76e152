"""What the card itself can do: its copies, its reads, its matrix products. All shares are of these.

python -m gpu_parts.card --device cuda --json FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import matrix_rate
from rollout import memory_bandwidth

from gpu_parts.record import table, write_tables

REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
}
"""Bits of NVML's reasons for lower clocks that make figures doubtful. The others are idleness and settings."""


def nvml_handle() -> tuple[Any, Any]:
    """NVIDIA's management library, and the first card that CUDA sees in it. It takes no memory of the card."""
    import os

    import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if first.isdecimal():
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first))
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)


def card_name() -> str | None:
    """The card's name; ``None`` where there is none that NVIDIA's library shows."""
    try:
        library, handle = nvml_handle()
    except Exception as error:  # the package, the driver or the card is missing: there is no error that all of them are
        print(f"NVIDIA's management library shows no card ({error}).")
        return None
    return library.nvmlDeviceGetName(handle)


def card_state() -> tuple[float, str]:
    """The card's power in watts now, and in words driver, clocks, power and temperature, or why they are unknown."""
    try:
        library, handle = nvml_handle()
        driver = library.nvmlSystemGetDriverVersion()
        kinds = (library.NVML_CLOCK_SM, library.NVML_CLOCK_MEM)
        clocks = [library.nvmlDeviceGetClockInfo(handle, kind) for kind in kinds]
        most = [library.nvmlDeviceGetMaxClockInfo(handle, kind) for kind in kinds]
        watts = library.nvmlDeviceGetPowerUsage(handle) / 1000
        limit = library.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        heat = library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU)
        state = library.nvmlDeviceGetPerformanceState(handle)
        bits = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        used = library.nvmlDeviceGetMemoryInfo(handle).used / 2**20
    except Exception as error:  # as in `card_name`; a card may also keep one of these to itself
        return 0.0, f"Clocks and power are not known: {error}."
    slowed = ", ".join(name for bit, name in REASONS.items() if bits & bit) or "nothing"
    return watts, (
        f"Driver {driver}, P{state}, SM clock {clocks[0]} of {most[0]} MHz, memory clock {clocks[1]} of {most[1]} MHz, "
        f"{watts:.0f} of {limit:.0f} W, {heat} degrees, {used:.0f} MiB in use; slowed down by {slowed}."
    )


def nominal_bandwidth() -> float | None:
    """GB/s by the card's highest memory clock and its bus: two transfers a clock. ``None`` on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    library, handle = nvml_handle()
    megahertz = library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_MEM)
    return 2 * megahertz * 1e6 * library.nvmlDeviceGetMemoryBusWidth(handle) / 8 / 1e9


def copy_bandwidth(device: str, seconds: float = 0.5) -> float:
    """GB/s of copying, read and written bytes together: the best of several copies that no cache holds."""
    import torch

    source = torch.ones(2**25 if device == "cpu" else 2**29, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / best_seconds(copy, device, seconds) / 1e9


def best_seconds(run: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest time of a call that can be had in that many seconds."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    wait()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def launch_microseconds(device: str) -> float:
    """The host's time for one small operation: what a step that is no graph pays for each of its kernels."""
    import torch

    x = torch.ones(8, device=device)

    def many() -> None:
        for _ in range(1000):
            x.add_(0.0)

    return best_seconds(many, device, 0.3) / 1000 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    options = parser.parse_args()
    import torch

    from online_dpo.training.metrics.speed import device_peak

    nominal, peak = nominal_bandwidth(), device_peak(torch.device(options.device))
    rates = {
        "copying, GB/s read and written": (
            copy_bandwidth(options.device, options.seconds),
            nominal,
        ),
        "reading, GB/s": (memory_bandwidth(options.device, options.seconds), nominal),
        "products in bfloat16, TFLOP/s": (matrix_rate(options.device, "bfloat16", options.seconds) / 1000, peak),
        "products in float32, TFLOP/s": (matrix_rate(options.device, "float32", options.seconds) / 1000, None),
    }
    rows: list[list[Any]] = [
        [name, measured, most, measured / most if most else None] for name, (measured, most) in rates.items()
    ]
    rows.append(["launch of a small operation, microseconds", launch_microseconds(options.device), None, None])
    made = table("What the card can do", ["", "measured", "nominal", "share"], rows, card_state()[1])
    write_tables(options.json, [made], **{row[0]: row[1] for row in rows})
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
