"""Checks that the optimizer trains the model's trainable weights, and reports weights that are left out."""

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
    """Check that something will be trained.

    Args:
        model: the policy.
        optimizer: an optimizer with the model's own parameters; ``None`` if it will be created from them later.

    Raises:
        ValueError: no weight is trainable, the optimizer holds no trainable weight, or all its learning rates are 0.
    """
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    if not trainable:
        how = HOW_TO_UNFREEZE_ADAPTER if is_peft_model(model) else HOW_TO_UNFREEZE
        raise ValueError(f"Nothing to train: all {sum(1 for _ in model.parameters())} weights are frozen. {how}.")
    if optimizer is None or isinstance(optimizer, LayerWiseDummyOptimizer):  # the dummy contains other optimizers
        return
    held = _parameter_ids(optimizer)
    if not trainable.keys() & held:
        raise ValueError(
            f"Nothing to train: the optimizer holds {len(held)} tensors, and none of the {len(trainable)} trainable "
            "weights of the model. It was made before the model got an adapter, or for a copy of it. Create it from "
            "the model that is trained (with `peft_config`: call `get_peft_model` first), or leave `optimizers` out."
        )
    if all(group.get("initial_lr", group["lr"]) == 0 for group in optimizer.param_groups):
        raise ValueError("Nothing to train: the learning rate of the optimizer is 0.")


def warn_of_untrained(model: nn.Module, optimizer: Any) -> None:
    """Warn of trainable weights that the optimizer does not hold, and of its tensors that are not the model's."""
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        return
    held = _parameter_ids(optimizer)
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    both = trainable.keys() & held
    not_in_model = held - {id(p) for p in model.parameters()}
    if len(both) < len(trainable) or not_in_model:
        logger.warning(
            "The optimizer holds %d of the %d trainable weights (%.0f %% of the numbers in them); the others are not "
            "trained. Tensors in it that are not the model's: %d.",
            len(both),
            len(trainable),
            100 * sum(trainable[i] for i in both) / sum(trainable.values()),
            len(not_in_model),
        )


def _parameter_ids(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
