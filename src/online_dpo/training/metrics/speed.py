"""The figures of a log about time and speed: shares, tokens per second, operations per second."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from online_dpo.distributed.collectives import world_size
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metrics.work import FLOPS, SAMPLED_TOKENS, TRAINED_TOKENS

PHASES = {
    "rollout": "sampling completions",
    "scoring": "asking rewards and judges",
    "training": "forward and backward passes, the reference's too",
    "sync": "giving weights to the sampler",
    "waiting": "waiting for what runs beside training",
}
"""Phases of a step, each with what is done in it."""

describe(
    "Time",
    *(
        Metric(f"time/{name}", "s", f"seconds since the last log for {what}; the mean over ranks", "What is slow.")
        for name, what in PHASES.items()
    ),
    Metric("time/reference", "s", "the part of `time/training` that the reference takes", "What a reference costs."),
    Metric(
        "time/all",
        "s",
        "seconds since the last log, without evaluations",
        "What the phases leave of it is pairing, packing, the optimizer and checkpoints.",
    ),
    *(
        Metric(f"time/share/{name}", "share", f"`time/{name}` / `time/all`", "The same, comparable between runs.")
        for name in PHASES
    ),
    Metric(
        "time/share/other",
        "share",
        "1 minus the shares above; at least 0, for with `max_staleness` phases overlap",
        "Above some 10 %: look at checkpoints (`save_steps`) and the optimizer (offloading).",
    ),
)
describe(
    "Speed",
    Metric(
        "perf/tokens_per_second",
        "tokens/s",
        "sampled tokens over all ranks / `time/all`",
        "The speed of the whole run. Compare settings by it.",
    ),
    Metric(
        "perf/rollout_tokens_per_second",
        "tokens/s",
        "sampled tokens over all ranks / `time/rollout`",
        "The speed of the engine. Low: a larger `rollout_batch_size`, or vLLM.",
    ),
    Metric(
        "perf/scoring_tokens_per_second",
        "tokens/s",
        "sampled tokens over all ranks / `time/scoring`",
        "The speed of rewards and judges. Low: a larger `reward_batch_size`, or `max_staleness`.",
    ),
    Metric(
        "perf/training_tokens_per_second",
        "tokens/s",
        "tokens that the policy reads in training, a shared prompt once, over all ranks / `time/training`",
        "The speed of the passes. Low: a larger `max_tokens_per_pass`.",
    ),
    Metric(
        "perf/teraflops",
        "10^12 operations/s",
        "operations of the models that sample and train / `time/all` / ranks: a token takes 6 for each weight in "
        "training (4, and 2 for each trained one, with an adapter), 2 in sampling and in the reference; and attention",
        "The speed of one process, independent of the length of answers. Gradient checkpointing and scorers do not "
        "count, nor what a server samples.",
        when="with models without experts, of usual configs",
    ),
    Metric(
        "perf/mfu",
        "share",
        "`perf/teraflops` / what the device does at most in dense bf16 products",
        "Model FLOPs utilisation. Training alone may reach 0.4; sampling, which waits for memory, lowers it.",
        when="on devices whose peak is known: A100, H100, H200, B200, L4, L40S, A10, V100, T4, some GeForce",
    ),
)

PEAKS = (
    (r"B200", 2250.0),  # DGX B200 data sheet: 36 PFLOPS with sparsity for eight in bf16
    (r"H100 NVL|H200 NVL", 835.5),  # H100 and H200 data sheets, without sparsity
    (r"H200|GH200|H100 80GB HBM3|H100 64GB", 989.4),  # the same, SXM
    (r"H100 PCIe", 756.5),  # NVIDIA H100 Tensor Core GPU Architecture, table 2
    (r"A100|A800", 312.0),  # A100 data sheet
    (r"L40S", 362.05),  # L40S data sheet
    (r"L4\b", 121.0),  # L4 data sheet: 242 with sparsity
    (r"A10\b", 125.0),  # A10 data sheet
    (r"V100-PCIE", 112.0),  # V100 data sheet, in fp16: it has no bf16
    (r"V100", 125.0),  # the same, SXM2
    (r"T4\b", 65.0),  # T4 data sheet, in fp16: it has no bf16
    (r"RTX 4090$", 165.2),  # NVIDIA Ada GPU Architecture, appendix A, with accumulation in fp32
    (r"RTX 3090$", 71.0),  # NVIDIA Ampere GA102 GPU Architecture, appendix A, with accumulation in fp32
)
"""Names of devices, and 10^12 operations per second of dense matrix products in bf16, as NVIDIA states them."""


def peak_teraflops(device_name: str) -> float | None:
    """Return the peak of a device; ``None`` if it is not known, as for a part of a device (MIG).

    >>> peak_teraflops("NVIDIA H100 PCIe")
    756.5
    """
    if " MIG " in device_name:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(rf"\b(?:{pattern})", device_name)), None)


def device_peak(device: torch.device) -> float | None:
    """Return the peak of the device that a process trains on; ``None`` if it is not known."""
    return peak_teraflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def speed_figures(metrics: Mapping[str, float], seconds: float, peak: float | None) -> dict[str, float]:
    """Return the metrics of a log, with totals of work replaced by figures per second.

    Args:
        metrics: over all ranks.
        seconds: since the last log.
        peak: of each process's device, in 10^12 operations per second.
    """
    figures = {name: value for name, value in metrics.items() if name not in (FLOPS, SAMPLED_TOKENS, TRAINED_TOKENS)}
    sampled, trained = metrics.get(SAMPLED_TOKENS, 0.0), metrics.get(TRAINED_TOKENS, 0.0)
    figures |= {"time/all": seconds, "perf/tokens_per_second": sampled / seconds}
    for phase, tokens in (("rollout", sampled), ("scoring", sampled), ("training", trained)):
        if spent := metrics.get(f"time/{phase}"):
            figures[f"perf/{phase}_tokens_per_second"] = tokens / spent
    shares = {name: metrics[f"time/{name}"] / seconds for name in PHASES if f"time/{name}" in metrics}
    figures |= {f"time/share/{name}": share for name, share in shares.items()}
    figures["time/share/other"] = max(0.0, 1 - sum(shares.values()))
    if FLOPS in metrics:
        figures["perf/teraflops"] = metrics[FLOPS] / seconds / world_size() / 1e12
        if peak is not None:
            figures["perf/mfu"] = figures["perf/teraflops"] / peak
    return figures
