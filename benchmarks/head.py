"""Log-probabilities of tokens from hidden states, forward and backward: this library's ways and the others there are.

    python benchmarks/head.py --tokens 1024 --hidden 512 --vocabulary 32000
    python benchmarks/head.py --device cuda --tokens 8192 --hidden 896 --vocabulary 151936

Each way gets the same hidden states, head and targets, and a different factor for each token's log-probability in the
backward pass, as DPO has it. Seconds are the best of several runs; memory is the peak above the inputs, MiB; TFLOP/s
are the products that cannot be avoided (logits, and the gradients of hidden states and head) in these seconds. Ways
that need a package or a function which is not installed, or another device, and ways that fail are named with the
reason. On a GPU hidden states and head are in bf16 by default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import MemoryMeter
from torch.utils.checkpoint import checkpoint

from online_dpo.modeling.fused_head import HALF, FusedLinearLogprobs, token_logprobs
from online_dpo.modeling.lm_head import LinearLogprobs
from online_dpo.modeling.logit_kernels import UNCOMPILED, compiled_kernels
from online_dpo.modeling.logprobs import chunk_size

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden_MH, weight_VH, target_M) to log-probabilities (M,)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotHereError(Exception):
    """Why a way cannot be taken here."""


@dataclass(frozen=True)
class Setup:
    """Where and how: the chunk's tokens, and what the head's inputs are."""

    size: int
    device: str
    dtype: torch.dtype


def all_at_once(setup: Setup) -> Way:
    def way(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        logps_MV = F.linear(hidden_MH, weight_VH).float().log_softmax(dim=-1)
        return logps_MV.gather(-1, target_M[:, None])[:, 0]

    return way


def unfused(setup: Setup) -> Way:
    return lambda h, w, t: LinearLogprobs.apply(h, w, None, t, False, setup.size)[0]


def fused(setup: Setup) -> Way:
    if setup.device == "cpu" and setup.dtype in HALF:
        raise NotHereError("products of bf16 numbers with a result in fp32 exist on CUDA only")
    return lambda h, w, t: FusedLinearLogprobs.apply(h, w, None, t, False, setup.size, compiled_kernels())[0]


def fused_uncompiled(setup: Setup) -> Way:
    fused(setup)
    return lambda h, w, t: FusedLinearLogprobs.apply(h, w, None, t, False, setup.size, UNCOMPILED)[0]


def any_head(setup: Setup) -> Way:
    def way(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        def project(hidden_XH: torch.Tensor, target_X: torch.Tensor) -> torch.Tensor:
            return token_logprobs(F.linear(hidden_XH, weight_VH), target_X, False)[0]

        chunks = zip(hidden_MH.split(setup.size), target_M.split(setup.size), strict=True)
        return torch.cat([checkpoint(project, *chunk, use_reentrant=False) for chunk in chunks])  # pyright: ignore

    return way


def torch_function(setup: Setup) -> Way:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotHereError(f"torch {torch.__version__} has none; 2.13 has")
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none")


def torch_function_chunked(setup: Setup) -> Way:
    torch_function(setup)
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def liger_cross_entropy(setup: Setup) -> Way:
    if setup.device != "cuda":
        raise NotHereError("Liger's kernels need a GPU")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except ImportError as error:
        raise NotHereError(f"Liger is not installed ({error})") from None
    return lambda h, w, t: -Liger.apply(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]


def liger_dpo(setup: Setup) -> Way:
    """A whole DPO loss with the head in it: one number, so that its gradient is that of another loss."""
    if setup.device != "cuda":
        raise NotHereError("Liger's kernels need a GPU")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotHereError(f"Liger is not installed ({error})") from None
    loss = LigerFusedLinearDPOLoss(use_ref_model=False)

    def way(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        return loss(weight_VH, hidden_MH.unflatten(0, (2, -1)), target_M.unflatten(0, (2, -1)))[0]

    return way


WAYS: dict[str, Callable[[Setup], Way]] = {
    "logits of all tokens at once": all_at_once,
    "ours, linear head": unfused,
    "ours, linear head, fused": fused,
    "ours, linear head, fused, uncompiled": fused_uncompiled,
    "ours, any other head": any_head,
    "torch linear_cross_entropy": torch_function,
    "torch linear_cross_entropy, chunked": torch_function_chunked,
    "Liger fused_linear_cross_entropy": liger_cross_entropy,
    "Liger fused_linear_dpo (another loss)": liger_dpo,
}


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
    parser.add_argument("--dtype", choices=list(DTYPES), help="float32 on a CPU, bfloat16 on a GPU, unless given")
    parser.add_argument("--frozen", action="store_true", help="the head has no gradient, as with LoRA")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    setup = Setup(chunk_size(options.vocabulary, torch.device(options.device)), options.device, dtype)
    torch.manual_seed(0)
    hidden_MH = torch.randn(options.tokens, options.hidden, device=options.device).to(dtype).requires_grad_()
    weight_VH = 0.05 * torch.randn(options.vocabulary, options.hidden, device=options.device)
    weight_VH = weight_VH.to(dtype).requires_grad_(not options.frozen)
    target_M = torch.randint(options.vocabulary, (options.tokens,), device=options.device)
    factor_M = torch.randn(options.tokens, device=options.device)
    useful = (2 if options.frozen else 3) * 2 * options.tokens * options.hidden * options.vocabulary
    right_within = 1e-4 if dtype == torch.float32 else 2e-2
    expected: torch.Tensor | None = None
    print(f"{'':38}{'seconds':>9}{'MiB':>8}{'TFLOP/s':>9}  gradient")
    for name, made in WAYS.items():
        try:
            seconds, peak, gradient_MH = measure(
                made(setup), (hidden_MH, weight_VH, target_M, factor_M), options.repetitions
            )
        except NotHereError as reason:
            print(f"{name:38}  left out: {reason}")
            continue
        except Exception as error:  # another package's: its version may not fit this torch
            print(f"{name:38}  failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        expected = gradient_MH if expected is None else expected
        error = float((gradient_MH.float() - expected.float()).norm() / expected.float().norm())
        told = "right" if error < right_within else f"off by {error:.1e}"
        print(f"{name:38}{seconds:9.4f}{peak:8.0f}{useful / seconds / 1e12:9.2f}  {told}")


if __name__ == "__main__":
    main()
