"""The device: whether the GPU that the run should use is there, and what it computes in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, gib, ok, problem, warning
from online_dpo.doctor.registry import check

DRIVER = Path("/proc/driver/nvidia/version")
"""A file of NVIDIA's driver."""
LARGE, TOO_LARGE = 300e6, 3e9
"""Numbers in a model with which a step takes minutes on a CPU, and hours."""


@check("device")
def device(case: Case) -> Iterator[Finding]:
    """GPUs that torch sees, their type of numbers, and a CPU that a large model would be trained on."""
    yield from _build_of_torch()
    args = case.args
    if args.device.type == "cpu":
        yield _on_cpu(case)
        return
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    shown = ", ".join(f"{one.name} ({gib(one.total_memory)})" for one in names)
    local = min(case.subject.processes, int(os.environ.get("LOCAL_WORLD_SIZE", case.subject.processes)))
    if args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield problem(f"`bf16` is on, and {names[0].name} does not compute in bfloat16", "Set `fp16: true` instead.")
    elif len(names) < local:
        yield warning(
            f"{case.subject.processes} processes will train, and there are {len(names)} GPUs here: {shown}",
            "Start no more processes than GPUs on each machine (`--nproc_per_node`).",
        )
    elif len(names) > local:
        yield warning(
            f"{len(names)} GPUs are visible, and {local} will be used: {shown}",
            f"Start one process for each with `torchrun --nproc_per_node {len(names)}`.",
        )
    else:
        kind = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        yield ok(f"{shown}; products in {kind}")


def _build_of_torch() -> Iterator[Finding]:
    """Compares torch with the driver."""
    if torch.cuda.is_available() or not DRIVER.exists():
        return
    driver = DRIVER.read_text().partition("\n")[0]
    if torch.version.cuda is None:
        yield problem(
            f"this machine has an NVIDIA driver, and torch {torch.__version__} is built for the CPU alone",
            "Install a build of torch with CUDA (https://pytorch.org/get-started).",
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield problem("CUDA_VISIBLE_DEVICES hides all GPUs of this machine", "Unset it, or name the GPUs to use.")
    else:
        yield problem(
            f"torch {torch.__version__} needs CUDA {torch.version.cuda} and finds no GPU with this driver: {driver}",
            "Update the driver, or install torch for an older CUDA.",
        )


def _on_cpu(case: Case) -> Finding:
    size, cores = case.counts.parameters, psutil.cpu_count(logical=False) or 1
    shown = f"the CPU ({cores} cores, {gib(psutil.virtual_memory().total)})"
    if size < LARGE:
        return ok(f"{shown}, for a model of {count_of(size)} weights", parameters=size)
    found = f"a model of {count_of(size)} weights would be trained on {shown}; no GPU is used"
    change = (
        "Take a machine with a GPU, or a smaller model."
        if not case.args.use_cpu
        else ("Leave `use_cpu` out on a machine with a GPU, or take a smaller model.")
    )
    return problem(found, change) if size > TOO_LARGE else warning(found, change)


def count_of(numbers: float) -> str:
    """A count in short.

    >>> count_of(494_032_768), count_of(1234)
    ('494 million', '1234')
    """
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if numbers >= size:
            return f"{numbers / size:.3g} {word}"
    return str(round(numbers))
