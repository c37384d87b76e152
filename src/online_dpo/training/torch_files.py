"""Files of a checkpoint that `torch.load` reads. They are pickles, of which only tensors and plain values are taken."""

from __future__ import annotations

import pickle  # for its exception alone  # nosec B403
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from online_dpo.errors import CheckpointError

PATTERNS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin", "adapter_model.bin")


def check_loads(folder: Path) -> None:
    """Check that a checkpoint without hashes holds only what `torch.load` takes, without reading its tensors.

    Raises:
        CheckpointError: a file is damaged, or holds objects, which could run code when they are loaded.
    """
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            raise CheckpointError(
                f"{folder} cannot be resumed from: {path.name} is damaged, or holds other things than tensors and "
                "plain values, which are not loaded because they could run any code."
            ) from None
