"""The check of FlexAttention's compiled kernels, forward and backward, by value, before a model trains through them.

The check at the start of a run computes no gradients, and whether a kernel can be compiled depends on the GPU, its
driver, Triton and the heads of the model. So each kind of call is tried once on small random tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from online_dpo.packing.prefix_tree import Tree, lay_out
from online_dpo.types import TokenRows

TOLERANCE = 2e-2
"""Largest relative difference: several times what half precision rounds, and far below what a wrong mask changes."""
WINDOW = 64
TREES = (
    Tree((0,) * 200, ((0,) * 60, (0,) * 90)),
    Tree((0,) * 20, ((0,) * 100, (0,) * 30)),
)
"""Trees whose block mask has empty, full and mixed blocks, and padding."""


@dataclass(frozen=True)
class Call:
    """What a compiled kernel depends on, apart from lengths.

    >>> Call(torch.device("cuda"), torch.bfloat16, heads=14, key_heads=2, size=64, value_size=64, scale=None,
    ...     windowed=False)
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    value_size: int
    scale: float | None
    windowed: bool

    def random_inputs(self, length: int) -> list[torch.Tensor]:
        """Query, key and value of one row, in the layout that models have; the random state stays as it is.

        They are no leaves of the graph, as in a model: Dynamo would compile a kernel for leaves apart.
        """
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.heads, self.size), (self.key_heads, self.size), (self.key_heads, self.value_size))
        made = [torch.randn(1, length, *shape, generator=generator) for shape in shapes]
        return [x.to(self.device, self.dtype).transpose(1, 2).requires_grad_() * 1 for x in made]


def sample_tokens(device: torch.device, length: int) -> TokenRows:
    """One row of `TREES` with ``length`` tokens."""
    tokens, _ = lay_out(TREES, shared=True, capacity=length)
    assert tokens.ids_RT.shape == (1, length)
    return tokens.to(device)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and its gradients with respect to the inputs, each output having another weight."""
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def expected(call: Call, inputs: list[torch.Tensor], mask: BlockMask) -> list[torch.Tensor]:
    """What `gradients` is to give: attention by plain matrix products, in fp32 at least."""
    query, key, value = (x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in inputs)
    groups, length = call.heads // call.key_heads, query.shape[2]
    visible = create_mask(mask.mask_mod, 1, 1, length, length, str(query.device))
    scale = 1 / math.sqrt(call.size) if call.scale is None else call.scale
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    output = scores.masked_fill(~visible, -math.inf).softmax(-1) @ value.repeat_interleave(groups, 1)
    return gradients(output, [query, key, value])


def largest_difference(got: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest relative difference between tensors that should be equal; nan where one is not finite."""
    pairs = zip(got, right, strict=True)
    differences = torch.stack([(x.to(y.dtype) - y).norm() / y.norm() for x, y in pairs])
    return differences.max().item()
