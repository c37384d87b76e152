"""Fingerprints of weights: cheap for models of any size, since only some values of each tensor are read."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from online_dpo.distributed.weights import full, gathered, shape_of

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types in which the bits of values of so many bytes are read as numbers."""
VALUES = 64
"""Values of each tensor that are read, evenly spaced."""


@torch.no_grad()
def weights_fingerprint(model: nn.Module, *, frozen_only: bool = False) -> str:
    """Returns the class of a model and a hash of its weights' names, shapes, types and some of their values. A
    collective operation if the model is sharded.

    Args:
        frozen_only: leave trainable weights out, such as those of an adapter that has just been made: its random
            numbers depend on the device.
    """
    digest = hashlib.sha256()
    with gathered(model):
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if frozen_only and parameter.requires_grad:
                continue
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            flat = parameter.detach().reshape(-1)
            if flat.numel():
                places = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel()), dtype=torch.float64).long()
                digest.update(flat[places.to(flat.device)].to("cpu", torch.float64).numpy().tobytes())
    name = type(model).__name__.removeprefix("FSDP")  # which makes a class of its own for each
    return f"{name}, weights {digest.hexdigest()[:16]}"


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """Returns a hash of a model's weights and buffers, in which every bit of them counts. A collective operation if the
    model is sharded; one tensor at a time is whole.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tuple(shape_of(tensor))} {tensor.dtype}".encode())
        whole = full(tensor).detach()
        if not whole.is_meta and not whole.is_complex():
            bits = whole.contiguous().reshape(-1).view(WORDS[whole.itemsize])
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
    return digest.hexdigest()[:16]
