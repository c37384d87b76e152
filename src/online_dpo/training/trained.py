"""What is trained: the weights that have a gradient and that the optimizer changes. Nothing may be an oversight."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

logger = logging.getLogger(__name__)

HOW_TO_UNFREEZE = "Call `model.requires_grad_(True)`, or give a `peft_config`"
HOW_TO_UNFREEZE_ADAPTER = "Load the adapter with `is_trainable=True`"


def check_trained(model: nn.Module, optimizer: Any = None) -> None:
    """
    Args:
        optimizer: one that holds the model's parameters themselves; not given where it will be made of them.

    Raises:
        ValueError: no weight is trainable, the optimizer holds none that is, or its learning rates are all 0.
    """
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    if not trainable:
        how = HOW_TO_UNFREEZE_ADAPTER if is_peft_model(model) else HOW_TO_UNFREEZE
        raise ValueError(f"Nothing to train: all {sum(1 for _ in model.parameters())} weights are frozen. {how}.")
    if optimizer is None or isinstance(optimizer, LayerWiseDummyOptimizer):  # that one holds optimizers of its own
        return
    held = _held(optimizer)
    if not trainable.keys() & held:
        raise ValueError(
            f"Nothing to train: the optimizer holds {len(held)} tensors, and none of the {len(trainable)} trainable "
            "weights of the model. It was made before the model got an adapter, or for a copy of it. Make it of the "
            "model that is trained (with `peft_config`: call `get_peft_model` first), or leave `optimizers` out."
        )
    if all(group.get("initial_lr", group["lr"]) == 0 for group in optimizer.param_groups):
        raise ValueError("Nothing to train: the learning rate of the optimizer is 0.")


def warn_of_untrained(model: nn.Module, optimizer: Any) -> None:
    """Says what could be trained and is not, and what the optimizer changes beside the model."""
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        return
    held = _held(optimizer)
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    both = trainable.keys() & held
    strangers = held - {id(p) for p in model.parameters()}
    if len(both) < len(trainable) or strangers:
        logger.warning(
            "The optimizer holds %d of the %d trainable weights (%.0f %% of the numbers in them); others stay as they "
            "are. Tensors in it that are not the model's: %d.",
            len(both),
            len(trainable),
            100 * sum(trainable[i] for i in both) / sum(trainable.values()),
            len(strangers),
        )


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
