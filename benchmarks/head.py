"""Log-probabilities of tokens from hidden states, forward and backward: this library's way and the others there are.

    python benchmarks/head.py --tokens 1024 --hidden 512 --vocabulary 32000

Each way gets the same hidden states, head and targets, and a different factor for each token's log-probability in the
backward pass, as DPO has it. Seconds are the best of several runs; memory is the peak above the inputs, MiB. Ways that
need a package which is not installed, or another device, are left out and named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import MemoryMeter
from torch.utils.checkpoint import checkpoint

from online_dpo.modeling.lm_head import LinearLogprobs, TokenLogprobs
from online_dpo.modeling.logprobs import chunk_size

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden_MH, weight_VH, target_M) to log-probabilities (M,)."""


def all_at_once(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    logps_MV = F.linear(hidden_MH, weight_VH).float().log_softmax(dim=-1)
    return logps_MV.gather(-1, target_M[:, None])[:, 0]


def ways(size: int, device: str) -> dict[str, Way]:
    def linear_head(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        return LinearLogprobs.apply(hidden_MH, weight_VH, None, target_M, False, size)[0]

    def any_head(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        def project(hidden_XH: torch.Tensor, target_X: torch.Tensor) -> torch.Tensor:
            return TokenLogprobs.apply(F.linear(hidden_XH, weight_VH), target_X, False)[0]

        chunks = zip(hidden_MH.split(size), target_M.split(size), strict=True)
        return torch.cat([checkpoint(project, *chunk, use_reentrant=False) for chunk in chunks])  # pyright: ignore

    made: dict[str, Way] = {
        "logits of all tokens at once": all_at_once,
        "ours, linear head": linear_head,
        "ours, any other head": any_head,
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        made["torch linear_cross_entropy"] = lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none")
        made["torch linear_cross_entropy, chunked"] = lambda h, w, t: (
            -F.linear_cross_entropy(h, w, t, reduction="none", options=options)
        )
    if device == "cuda":
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
        except ImportError:
            print("Liger is not installed: left out")
        else:
            made["Liger fused_linear_cross_entropy"] = lambda h, w, t: (
                -Liger.apply(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]
            )
    else:
        print("Liger's kernels need a GPU: left out")
    return made


def measure(way: Way, inputs: tuple[torch.Tensor, ...], repetitions: int) -> tuple[float, float, torch.Tensor]:
    """Best seconds, peak MiB, and the gradient with respect to the hidden states."""
    hidden_MH, weight_VH, target_M, factor_M = inputs
    meter, seconds = MemoryMeter(hidden_MH.device.type), []

    def run() -> None:
        hidden_MH.grad = weight_VH.grad = None
        (way(hidden_MH, weight_VH, target_M) * factor_M).sum().backward()
        if hidden_MH.device.type == "cuda":
            torch.cuda.synchronize()

    run()
    assert hidden_MH.grad is not None
    gradient_MH = hidden_MH.grad.clone()
    hidden_MH.grad = weight_VH.grad = None
    meter.start()
    run()
    peak = meter.stop()["step"]
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), peak, gradient_MH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden_MH = torch.randn(options.tokens, options.hidden, device=options.device).requires_grad_()
    weight_VH = (0.05 * torch.randn(options.vocabulary, options.hidden, device=options.device)).requires_grad_()
    target_M = torch.randint(options.vocabulary, (options.tokens,), device=options.device)
    factor_M = torch.randn(options.tokens, device=options.device)
    size = chunk_size(options.vocabulary, torch.device(options.device))
    expected: torch.Tensor | None = None
    print(f"{'':38}{'seconds':>9}{'MiB':>8}  gradient")
    for name, way in ways(size, options.device).items():
        seconds, peak, gradient_MH = measure(way, (hidden_MH, weight_VH, target_M, factor_M), options.repetitions)
        expected = gradient_MH if expected is None else expected
        error = float((gradient_MH - expected).norm() / expected.norm())
        print(f"{name:38}{seconds:9.3f}{peak:8.0f}  {'right' if error < 1e-4 else f'off by {error:.1e}'}")


if __name__ == "__main__":
    main()
