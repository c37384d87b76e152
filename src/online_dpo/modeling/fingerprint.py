"""Fingerprints of weights: cheap for models of any size, since only some values of each tensor are read."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from online_dpo.distributed.weights import gathered

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
