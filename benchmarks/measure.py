"""What is measured: seconds by phase, peak memory, the matrix rate of the machine, and the work a step needs."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workloads import Shape

PHASES = ("generate", "score", "reference", "policy_forward", "backward", "optimizer")
"""Disjoint parts of a step; "other" is what is left of it."""

MIB = 2**20


class PhaseTimer:
    """Seconds by phase of one step. A phase inside another one counts as its own only.

    Args:
        synchronize: waits until the device has done what was asked of it; called wherever a phase begins or ends.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.start()

    def start(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys((*PHASES, "other"), 0.0)
        self._open = ["other"]
        self._synchronize()
        self._last = time.perf_counter()

    def _charge(self) -> None:
        """Puts the time since the last boundary down to the phase that is open."""
        self._synchronize()
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def stop(self) -> dict[str, float]:
        """Seconds by phase, with ``step`` (all of it) and ``non_generation`` (all but sampling)."""
        self._charge()
        assert self._open == ["other"]
        step = sum(self._seconds.values())
        return {**self._seconds, "step": step, "non_generation": step - self._seconds["generate"]}


# --- memory ----------------------------------------------------------------------------------------------------------


class MemoryMeter:
    """Peak memory of one step, apart for sampling and for the rest, in MiB above what the process held before it.

    On a CPU it reads the resident memory of the process and its high-water mark. Freed memory that the allocator keeps
    would count as used, so it is given back at each boundary: that costs time, and a step whose memory is measured is
    not one whose time is. On a GPU it is the allocator's own count of live bytes; beside it stands what the allocator
    has reserved, which is what the card must have room for: what is live, what it keeps, and what it loses to gaps.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._peak = {"generation": 0.0, "non_generation": 0.0}
        self._baseline = self._reserved = 0.0

    def held(self) -> float:
        """MiB that the process holds now, after everything unused has been given back."""
        self._give_back()
        return self._now()

    def start(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.empty_cache()  # so that what earlier steps have reserved does not count
        self._baseline, self._reserved = self.held(), 0.0
        self._peak = dict.fromkeys(self._peak, 0.0)
        self._reset()

    def boundary(self, ended: str) -> None:
        """``ended``: "generation" or "non_generation", the part that ends here."""
        self._peak[ended] = max(self._peak[ended], self._read_peak())
        self._reserved = max(self._reserved, self._read_reserved())
        self._give_back()
        self._reset()

    def stop(self) -> dict[str, float]:
        """``baseline`` in MiB; ``generation``, ``non_generation`` and ``step`` in MiB above it. ``allocated`` and
        ``reserved``, the same peak with the baseline, and of what the allocator has reserved on a GPU.
        """
        self.boundary("non_generation")
        above = {part: max(0.0, peak - self._baseline) for part, peak in self._peak.items()}
        whole = {"allocated": max(self._peak.values()), "reserved": self._reserved}
        return {"baseline": self._baseline, **above, "step": max(above.values()), **whole}

    def _give_back(self) -> None:
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        else:
            ctypes.CDLL(None).malloc_trim(0)

    def _now(self) -> float:
        if self._cuda:
            import torch

            return torch.cuda.memory_allocated() / MIB
        return _status("VmRSS")

    def _read_peak(self) -> float:
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() / MIB
        return _status("VmHWM")

    def _read_reserved(self) -> float:
        if self._cuda:
            import torch

            return torch.cuda.max_memory_reserved() / MIB
        return self._read_peak()  # without a GPU's allocator: what is resident

    def _reset(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark to what is resident now


def device_used_mib(device: str) -> float:
    """MiB of the card in use now, by all processes; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def _status(field: str) -> float:
    """A size in /proc/self/status, in MiB."""
    with open("/proc/self/status") as file:
        kib = next(line.split()[1] for line in file if line.startswith(field + ":"))
    return int(kib) / 1024


# --- work ------------------------------------------------------------------------------------------------------------


def matrix_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """GFLOP/s of matrix products at the size that goes fastest: the limit no step can beat."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        c = a @ b  # reused, so that no memory is asked for in what is timed
        wait()
        start = time.perf_counter()
        while (begin := time.perf_counter()) < start + seconds:
            torch.mm(a, b, out=c)
            wait()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best / 1e9


def attention_flop(shape: Shape, first: int, count: int) -> int:
    """FLOP of causal attention for ``count`` tokens of which the first sees ``first`` tokens, itself included.

    A token that sees n tokens costs 2 n hidden for its scores and as much for its weighted sum, in each layer.
    """
    seen = count * first + count * (count - 1) // 2
    return 4 * shape.layers * shape.hidden * seen


def group_forward_flop(shape: Shape, prompt: int, completions: Sequence[int], head: bool) -> int:
    """FLOP of one forward pass over a prompt and its completions (lengths in tokens), the prompt computed once.

    ``2 * layers * layer_weights`` for each token, the attention of each token over its prompt and its own completion,
    and, with ``head``, ``2 * hidden * vocabulary`` for each completion token that is predicted. Norms, rotary
    embeddings, activations and a reward head are left out: they are no matrix products, or far below one percent.
    """
    tokens = prompt + sum(completions)
    flop = 2 * shape.layers * shape.layer_weights * tokens + attention_flop(shape, 1, prompt)
    flop += sum(attention_flop(shape, prompt + 1, length) for length in completions)
    return flop + (2 * shape.hidden * shape.vocabulary * sum(completions) if head else 0)


def useful_gflop(
    shape: Shape, prompts: Sequence[int], scored: Sequence[Sequence[int]], trained: Sequence[Sequence[int]], passes: int
) -> float:
    """GFLOP that the part of a step after sampling cannot do without, for one group a list item.

    For each group: ``passes`` forward passes' worth for the policy (3 when all weights are trained: forward, gradient
    of activations, gradient of weights; 2 when all but an adapter are frozen, whose own small work is left out), 1 for
    the reference, both over the ``trained`` completions; and 1 for the reward model over all ``scored`` ones, without
    head. Work done twice (recomputed activations, a prompt in several rows) does not count, nor does padding.
    """
    flop = 0
    for prompt, all_lengths, pair in zip(prompts, scored, trained, strict=True):
        flop += (passes + 1) * group_forward_flop(shape, prompt, pair, head=True)
        flop += group_forward_flop(shape, prompt, all_lengths, head=False)
    return flop / 1e9


# --- summaries -------------------------------------------------------------------------------------------------------


def summarise(steps: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest seconds of each phase over steps; phases that a side never enters are left out."""
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in steps[0]
        if any(values := [step[name] for step in steps])
    }


def limit_share(useful: Sequence[float], steps: Sequence[Mapping[str, float]], rate: float) -> float:
    """Median over steps of: useful GFLOP over what the machine could have done in the non-generation seconds."""
    shares = [gflop / (step["non_generation"] * rate) for gflop, step in zip(useful, steps, strict=True)]
    return statistics.median(shares)


def describe_machine(device: str, threads: int) -> str:
    """The processor's or the accelerator's name."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {threads} threads"


def versions() -> dict[str, Any]:
    """Of everything that decides the figures."""
    from importlib.metadata import PackageNotFoundError, version

    from online_dpo import __version__

    found: dict[str, Any] = {"python": sys.version.split()[0], "online-dpo": __version__}  # it may not be installed
    for package in ("torch", "triton", "transformers", "accelerate", "trl", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
