"""Bytes that the head reads and writes of each logit, before (`lm_head`) and now (`fused_head`, on a GPU).

    python benchmarks/head_passes.py

Counted on a CPU, operation by operation, with small tensors in bf16: what a tensor with a column for each word of the
vocabulary is read and written for. A compiled pass counts as one operation, since Inductor makes one kernel of each,
which reads the logits once (the test of this page asks Inductor). What has V x H numbers is counted for each weight.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online_dpo.modeling.fused_head import FusedLinearLogprobs
from online_dpo.modeling.lm_head import LinearLogprobs
from online_dpo.modeling.logit_kernels import LogitKernels, logit_gradient, softmax_sums

TOKENS, HIDDEN, VOCABULARY = 48, 8, 4096
SINGLE_NUMBERS = ("gather", "scatter_add_")  # of a row they touch one number
VIEWS = ("view", "detach", "alias", "t", "slice", "select", "expand", "unsqueeze", "_unsafe_view")
MOVES_NOTHING = (*VIEWS, "empty", "empty_like", "new_empty")
WRITES_ONLY = ("copy_", "fill_", "zero_", "zeros_like", "ones_like", "new_zeros")  # not what their first tensor holds


@dataclass
class Moved:
    """Bytes for each logit, for each number of the head's weight, and kernels that touch logits."""

    logits: float = 0.0
    weight: float = 0.0
    passes: int = 0


@torch.library.custom_op("online_dpo_benchmarks::sums", mutates_args=())
def one_kernel_of_sums(
    logits: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logps, entropies, top, log_sum = softmax_sums(logits, bias, target, entropy)
    return logps, entropies, top.clone(), log_sum


@torch.library.custom_op("online_dpo_benchmarks::gradient", mutates_args=())
def one_kernel_of_gradients(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    top: torch.Tensor,
    log_sum: torch.Tensor,
    grad: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return logit_gradient(logits, bias, target, top, log_sum, grad, dtype)


KERNELS = LogitKernels(one_kernel_of_sums, one_kernel_of_gradients)
"""The passes over logits as operators, which allocate nothing but their results: as if compiled."""


class Count(TorchDispatchMode):
    """Counts inside what operations read and write, and computes the products that only CUDA has."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = Moved()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = self._computed(func, args, kwargs)
        name = func.overloadpacket.__name__
        if name not in (*MOVES_NOTHING, *SINGLE_NUMBERS):
            out = kwargs.get("out")
            read = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)][name in WRITES_ONLY :]
            wrote = [out] if out is not None else [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            self._add(read + wrote)
        return made

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.mm.dtype_out:
            return torch.mm(args[0].float(), args[1].float(), out=kwargs["out"])
        if func is torch.ops.aten.addmm.dtype_out:
            return torch.addmm(args[0], args[1].float(), args[2].float(), out=kwargs["out"])
        return func(*args, **kwargs)

    def _add(self, tensors: list[torch.Tensor]) -> None:
        touched = False
        for tensor in tensors:
            if tensor.dim() != 2 or VOCABULARY not in tensor.shape:
                continue
            if HIDDEN in tensor.shape:
                self.moved.weight += tensor.nbytes / (VOCABULARY * HIDDEN)
            else:
                self.moved.logits += tensor.nbytes / (VOCABULARY * TOKENS)
                touched = True
        self.moved.passes += touched


def moved(fused: bool, entropy: bool, trained: bool | None, backward: bool = False, chunks: int = 2) -> Moved:
    """What one forward or backward pass moves; ``trained`` is ``None`` where there is no gradient at all."""
    weight_VH = torch.randn(VOCABULARY, HIDDEN).bfloat16().requires_grad_(trained is True)
    hidden_MH = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_(trained is not None)
    inputs = hidden_MH, weight_VH, None, torch.zeros(TOKENS, dtype=torch.long), entropy, TOKENS // chunks
    with Count() as forward:
        logps_M = FusedLinearLogprobs.apply(*inputs, KERNELS)[0] if fused else LinearLogprobs.apply(*inputs)[0]
    if not backward:
        return forward.moved
    with Count() as count:
        logps_M.backward(torch.randn(TOKENS))
    return count.moved


CASES: dict[str, dict[str, Any]] = {
    "log-probabilities alone": dict(entropy=False, trained=None),
    "with entropies": dict(entropy=True, trained=None),
    "forward, head frozen": dict(entropy=True, trained=False),
    "forward, head trained": dict(entropy=True, trained=True),
    "backward, head trained": dict(entropy=True, trained=True, backward=True),
}


def table() -> str:
    """Returns the table, in Markdown."""
    lines = ["| | bytes a logit, before | now | passes, before | now | bytes a weight, before | now |"]
    lines.append("|---|" + "---:|" * 6)
    for name, case in CASES.items():
        before, now = (moved(fused, **case) for fused in (False, True))
        cells = f"{before.logits:.0f} | {now.logits:.0f} | {before.passes / 2:.0f} | {now.passes / 2:.0f}"
        lines.append(f"| {name} | {cells} | {before.weight:.0f} | {now.weight:.0f} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    print(table())


if __name__ == "__main__":
    main()
