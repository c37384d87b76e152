"""Models and values for the tests of tests/gpu."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from support import tiny

SIZES = dict(
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
"""Heads of 64 numbers, and two queries for a key."""
SHARPNESS = 1.5


def model(family: str, device: torch.device, sharpness: float = SHARPNESS, **overrides: Any) -> Any:
    """A model of a family with these sizes, in fp32 on the device."""
    sizes: dict[str, Any] = dict(SIZES)
    if family in ("qwen3", "gemma", "gemma2"):
        sizes["head_dim"] = 64
    return tiny.causal_lm(family, sharpness=sharpness, **(sizes | overrides)).to(device)


def in_fp64(one: nn.Module) -> Any:
    """A copy with weights of fp64, which computes in fp64: what values are compared with."""
    return copy.deepcopy(one).double().eval()


@torch.no_grad()
def logprobs_alone(reference: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of a completion, one sequence at a time, without a cache, (M,) in fp64 on the CPU."""
    device = next(reference.parameters()).device
    ids = torch.tensor([[*prompt, *completion]], device=device)
    logps_MV = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps_MV.gather(-1, ids[0, len(prompt) :, None])[:, 0].double().cpu()


def change(one: nn.Module, seed: int = 7) -> None:
    """Other weights at the same addresses, as after an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.05 * noise * parameter.std().nan_to_num(0.0))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of what is right."""
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm().clamp_min(1e-12))
