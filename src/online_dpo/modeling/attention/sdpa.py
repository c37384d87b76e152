"""SDPA on a GPU, with the kernel chosen here and the mask converted once a pass.

PyTorch's SDPA converts a boolean mask at every call, and each layer keeps its own copy for the backward pass. It also
falls back to its math kernel, which materialises all scores, without a word. `torch.nn.attention.sdpa_kernel` would set
the kernel for all threads of the process, and reward models compute in others; so the kernel is called by name.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

NAME = "online_dpo_sdpa"
KERNEL_ON = {"cuda"}
"""Device types that have the memory-efficient kernel."""
ALIGNMENT = 16
"""Bytes. The memory-efficient kernel reads heads and rows of the mask in such pieces."""
FLASH_HEAD = 256
"""The largest head of PyTorch's flash kernel."""

_biases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The additive form of each mask that is in use."""
_told: set[tuple[torch.dtype, int, int]] = set()


def register() -> None:
    """Registers the attention function with transformers, as ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: on a GPU the memory-efficient kernel if there is a mask, or if
    the flash kernel cannot be used; else PyTorch's SDPA as it is.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    special = kwargs.get("position_bias") is not None or torch.compiler.is_compiling()
    if query.device.type not in KERNEL_ON or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    query, key, value = in_computing_dtype(query, key, value)
    causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, is_causal)
    if attention_mask is None and (_flash_fits(query, value) or (causal and query.shape[2] != key.shape[2])):
        return sdpa_attention_forward(module, query, key, value, None, **given)
    if not _efficient_fits(query, value):
        _tell(query, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    groups = query.shape[1] // key.shape[1]
    output = memory_efficient(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        None if attention_mask is None else additive(attention_mask, query.dtype),
        causal,
        dropout,
        scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def memory_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Attention through PyTorch's memory-efficient CUDA kernel, from and to (rows, heads, tokens, head size)."""
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, trains, dropout, causal, scale=scale
    )[0]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as numbers to add to attention scores, aligned as the kernel needs it; made once for each mask and type.

    Hidden keys get the lowest number of the type, not minus infinity: a query without any key then gets a mean of all
    values, where infinities would give nan, which would spread from padding to the tokens of the next layer.
    """
    known = _biases.get(mask)
    if known is not None and known.dtype == dtype:
        return known
    keys = mask.shape[-1]
    step = ALIGNMENT // dtype.itemsize
    aligned = torch.zeros(*mask.shape[:-1], -(-keys // step) * step, dtype=dtype, device=mask.device)
    bias = aligned[..., :keys]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, torch.finfo(dtype).min)
    else:
        bias.copy_(mask)
    _biases[mask] = bias
    return bias


def in_computing_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's type, if it is on. Rotary embeddings promote queries and keys to fp32, and only
    PyTorch's own SDPA is cast by autocast.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    return getattr(module, "is_causal", True) if given is None else given  # as transformers reads it


def _flash_fits(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether PyTorch chooses its flash kernel where there is no mask, also if heads share keys and values."""
    head = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and head == value.shape[-1] and head <= FLASH_HEAD


def _efficient_fits(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the heads have sizes that the memory-efficient kernel reads."""
    step = ALIGNMENT // query.dtype.itemsize
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return query.dtype in floats and query.shape[-1] % step == 0 and value.shape[-1] % step == 0


def _tell(query: torch.Tensor, value: torch.Tensor) -> None:
    case = (query.dtype, query.shape[-1], value.shape[-1])
    if case not in _told:
        _told.add(case)
        logger.warning(
            "Attention with heads of %d and %d in %s does not fit the memory-efficient kernel: PyTorch chooses one, "
            "which may hold all attention scores in memory.",
            *case[1:],
            case[0],
        )
