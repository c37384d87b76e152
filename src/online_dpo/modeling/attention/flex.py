"""FlexAttention for rows that share prompts: blocks of the attention mask that are all masked are not computed.

So many trees can be packed into one row, without padding, at little cost. Training needs a GPU; on a CPU only the
forward pass works, uncompiled.

Shapes: ``R`` rows, ``T`` tokens of a row, ``B`` blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from online_dpo.modeling.attention import kernel_check, sdpa
from online_dpo.modeling.attention.kernel_check import Call
from online_dpo.modeling.compiling import recompilation_limit
from online_dpo.packing.prefix_tree import BLOCK, PADDING
from online_dpo.types import TokenRows

NAME = "online_dpo_flex"
COMPILED_ON = {"cuda"}
"""Device types on which FlexAttention is compiled. Uncompiled it materialises all scores, as it does on a CPU."""
BACKEND = "inductor"
COMPILATIONS = 64
"""Most compilations of `_compute`: one for each kind of mask, heads, type, with and without gradient. Dynamo's own
limit of 8 is too low for a policy, a reference and a reward model that differ."""
SHORTEST = 2 * BLOCK
"""Fewest tokens of a row. A row of one block would be compiled apart: Dynamo takes dimensions of 1 as constants."""
WINDOWED = "in_reach"
"""The name of the function of a block mask with a window or chunks (see `_visible`)."""
CHUNK = 2**26
"""Elements of the dense mask that exist at the same time while a block mask is made."""

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_compiled: dict[Any, Callable[..., torch.Tensor]] = {}
_right: set[Call] = set()
"""Kinds of call whose compiled kernels gave the right values."""


class WrongKernelError(RuntimeError):
    """A compiled kernel of FlexAttention that computes other values than plain attention."""


def register() -> None:
    """Registers the attention function with transformers, as ``NAME``."""
    sdpa.register()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: FlexAttention if the mask is a `BlockMask`, else SDPA (sampling,
    padded rows).

    Raises:
        NotImplementedError: with a block mask, dropout in attention, a soft cap, or attention sinks.
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa.attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError("`flex_attention` supports no dropout in attention, soft caps or attention sinks")
    query, key, value = sdpa.in_computing_dtype(query, key, value)
    return masked(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float | None
) -> torch.Tensor:
    """FlexAttention from and to (rows, heads, tokens, head size), compiled where the device type is in `COMPILED_ON`.

    Each kind of call is checked by value once, with its gradients (`kernel_check`).

    Raises:
        WrongKernelError: a compiled kernel computes something else.
        torch._dynamo.exc.FailOnRecompileLimitHit: it had to be compiled more than `COMPILATIONS` times. Without
            ``fullgraph`` it would run uncompiled from then on.
    """
    if query.device.type not in COMPILED_ON:
        return _compute(query, key, value, mask, scale, query.shape[1] != key.shape[1])
    call = Call(
        query.device,
        query.dtype,
        heads=query.shape[1],
        key_heads=key.shape[1],
        size=query.shape[3],
        value_size=value.shape[3],
        scale=scale,
        windowed=mask.mask_mod.__name__ == WINDOWED,
    )
    if call not in _right:
        _check(call)
    return _call_compiled(query, key, value, mask, scale)


def _check(call: Call) -> None:
    """Checks the compiled kernels of one kind of call, forward and backward."""
    tokens = kernel_check.sample_tokens(call.device, 4 * BLOCK)
    mask = block_mask(tokens, kernel_check.WINDOW if call.windowed else None, None)
    # Inside a checkpointed layer: its hooks must not count what is saved here.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.enable_grad(), torch.autocast(call.device.type, enabled=False), apart:
        inputs = call.random_inputs(4 * BLOCK)
        right = kernel_check.expected(call, inputs, mask)
        query, key, value = inputs
        got = kernel_check.gradients(_call_compiled(query, key, value, mask, call.scale), inputs)
        difference = kernel_check.largest_difference(got, right)
    if not difference <= kernel_check.TOLERANCE:
        raise WrongKernelError(f"FlexAttention's kernel is wrong by {difference:.1e} of its values ({call})")
    _right.add(call)


def _call_compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float | None
) -> torch.Tensor:
    """`_compute`, compiled once for all lengths."""
    if BACKEND not in _compiled:
        _compiled[BACKEND] = torch.compile(_compute, backend=BACKEND, dynamic=True, fullgraph=True)
    with recompilation_limit(COMPILATIONS):
        return _compiled[BACKEND](query, key, value, mask, scale, query.shape[1] != key.shape[1])


def _compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scale: float | None,
    shares_heads: bool,
) -> torch.Tensor:
    """A function of its own, because Dynamo counts compilations by function: others compile `flex_attention` too."""
    output = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=shares_heads)
    assert isinstance(output, torch.Tensor)
    return output


def block_mask(tokens: TokenRows, window: int | None, chunk: int | None) -> BlockMask:
    """The attention mask of `masks.visible_mask`, as the block mask of FlexAttention. Padding attends to itself only.

    Windows and chunks are data, not constants in the code, so that all masks with one share their compiled kernel.
    """
    rows, length = tokens.tree_RT.shape
    assert length % BLOCK == 0, "rows are padded to whole blocks before"
    visible = _visible(*_segments(tokens), *_reach(tokens, window, chunk))
    visible_RBB = _tokens_visible(visible, rows, length, tokens.tree_RT.device)
    full_RBB = visible_RBB == BLOCK * BLOCK
    partial_RBB = (visible_RBB > 0) & ~full_RBB
    # Blocks are counted without compiling `create_block_mask`, which would be compiled again and again.
    mask = BlockMask.from_kv_blocks(
        *_ordered(partial_RBB), *_ordered(full_RBB), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )
    for blocks in mask.as_tuple():
        if isinstance(blocks, torch.Tensor):  # else as many blocks as there are heads would be compiled as a constant
            torch._dynamo.maybe_mark_dynamic(blocks, list(range(2, blocks.dim())))
    return mask


def _segments(tokens: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    """A number for the segment (prompt or completion) of each token, and that of its tree's prompt, (R, T) each."""
    tree_RT = tokens.tree_RT
    padding_RT = -1 - torch.arange(tree_RT.shape[1], device=tree_RT.device).expand_as(tree_RT)
    prompt_RT = torch.where(tree_RT == PADDING, padding_RT, tree_RT << 32)
    return prompt_RT + tokens.branch_RT, prompt_RT


def _reach(tokens: TokenRows, window: int | None, chunk: int | None) -> tuple[torch.Tensor, ...]:
    """The position of each token and the lowest one that it attends to, (R, T) each; nothing if it attends to all."""
    position_RT = tokens.positions_RT
    if window is not None:
        return position_RT, position_RT - window + 1
    if chunk is not None:
        return position_RT, position_RT // chunk * chunk
    return ()


def _visible(
    segment_RT: torch.Tensor,
    prompt_RT: torch.Tensor,
    position_RT: torch.Tensor | None = None,
    lowest_RT: torch.Tensor | None = None,
) -> MaskMod:
    """The function that says whether query ``i`` of row ``r`` attends to key ``j``."""

    def of_segments(r: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        key = segment_RT[r, j]
        return (j <= i) & ((key == segment_RT[r, i]) | (key == prompt_RT[r, i]))

    if position_RT is None or lowest_RT is None:
        return of_segments

    def in_reach(r: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return of_segments(r, head, i, j) & (position_RT[r, j] >= lowest_RT[r, i])

    return in_reach


def _tokens_visible(visible: MaskMod, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """The number of pairs of query and key in each block that attend, (R, B, B)."""
    blocks = length // BLOCK
    r = torch.arange(rows, device=device)[:, None, None]
    j = torch.arange(length, device=device)
    queries = max(1, CHUNK // (rows * length * BLOCK)) * BLOCK
    counts = []
    for start in range(0, length, queries):
        i = torch.arange(start, min(start + queries, length), device=device)[:, None]
        dense = visible(r, r, i, j).view(rows, -1, BLOCK, blocks, BLOCK)
        counts.append(dense.sum(dim=(2, 4), dtype=torch.int32))
    return torch.cat(counts, dim=1)


def _ordered(dense_RBB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries: the number of blocks of keys that are true, and all indices, theirs first."""
    counts = dense_RBB.sum(-1, dtype=torch.int32)
    indices = dense_RBB.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None].contiguous(), indices[:, None].contiguous()
