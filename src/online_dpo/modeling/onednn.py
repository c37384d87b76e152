"""Matrix products without gradient on a CPU, computed by oneDNN.

For products in fp32 PyTorch calls MKL, which first copies the weight into its own layout, every time. With the few rows
of a decoding step this takes longer than the product. oneDNN can keep a packed copy of a weight for many products, and
is faster with few rows anyway: measured on AVX-512, 2 to 5 times with 16 rows, and 1.3 times with 256 rows of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from online_dpo.distributed.weights import is_whole
from online_dpo.modeling.patching import replaced_forwards


def supports_onednn(weight: torch.Tensor) -> bool:
    """Whether `linear` can compute products with this weight: a plain fp32 tensor on a CPU, and oneDNN is enabled."""
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype == torch.float32 and is_whole(weight)
    return plain and weight.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias`` without gradient; ``weight`` may be packed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@contextmanager
def onednn_linears(model: nn.Module, pack: bool) -> Iterator[None]:
    """Inside, the model's linear layers are computed by `linear`, without gradient.

    Layers that oneDNN does not support, and all layers under autocast, are computed as usual.

    Args:
        pack: multiply with packed copies, which are made once, at the start. Packing takes about as long as two
            decoding steps, so it is worth it for many products with few rows each.
    """
    autocast = torch.is_autocast_enabled("cpu")
    layers: list[Any] = [] if autocast else [module for module in model.modules() if _can_be_replaced(module)]
    forwards: dict[nn.Module, Any] = {}
    for layer in layers:
        weight = layer.weight.detach()
        if pack:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        forwards[layer] = partial(_forward, weight, None if layer.bias is None else layer.bias.detach())
    with replaced_forwards(forwards):
        yield


def _forward(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return linear(input, weight, bias)


def _can_be_replaced(module: nn.Module) -> bool:
    # A `forward` on the module itself belongs to a hook or to another replacement.
    return type(module) is nn.Linear and "forward" not in vars(module) and supports_onednn(module.weight)
