"""What a checkpoint holds of a sharded run: whole weights, and in shards what the optimizer updates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import CONFIG_NAME
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from online_dpo.checkpoints.shard_names import has_shards
from online_dpo.distributed.collectives import is_first_rank, world_size
from online_dpo.distributed.sharding import Sharding
from online_dpo.distributed.updated import Updated
from online_dpo.distributed.weights import full, is_partitioned, is_whole
from online_dpo.errors import CheckpointError
from online_dpo.modeling.borrowing import kept_attributes
from online_dpo.training import shards

ADAM = ("Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam")
"""Optimizers that go on from each other's state."""


class ShardedState:
    """Saves and restores the policy and its optimizer where ranks hold parts of them.

    Args:
        sharding: how they do.
        model: the policy as it was given, whole.
        on_each_node: whether each machine saves into a folder of its own.

    Raises:
        ValueError: it does, and the state lies in parts on all machines.
    """

    def __init__(self, sharding: Sharding, model: nn.Module, on_each_node: bool = False) -> None:
        if sharding.splits_state and on_each_node:
            raise ValueError(
                "`save_on_each_node` would leave a part of each sharded checkpoint on each machine, and none could be "
                "resumed from. Leave it off, and give an `output_dir` that all machines share."
            )
        self._sharding = sharding
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._order: list[str] = []

    @property
    def is_on(self) -> bool:
        """Whether this run saves its state in shards."""
        return self._sharding.splits_state

    def reads(self, checkpoint: str | Path) -> bool:
        """Whether the optimizer's state of a checkpoint is read here, and not by `transformers.Trainer`."""
        return self.is_on or has_shards(Path(checkpoint))

    def reads_weights(self, folder: str, model: nn.Module) -> bool:
        """Whether the weights of a checkpoint are in its shards too; else they are read while the model is whole.

        Raises:
            CheckpointError: neither is so: the model has been sharded in an earlier `train`.
        """
        if has_shards(Path(folder)):
            return True
        if any(not is_whole(parameter) or is_partitioned(parameter) for parameter in model.parameters()):
            raise CheckpointError(f"{folder} holds no shards, and the model has been sharded: resume in a new process.")
        return False

    def remember_order(self, model: nn.Module, optimizer: Any) -> None:
        """Remembers in which order an optimizer of whole weights has them, before anything is sharded."""
        if self.is_on and isinstance(optimizer, torch.optim.Optimizer):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            self._order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def save(self, output_dir: str | Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Writes what this rank's optimizer updates, and on rank 0 what all share."""
        folder, updated = Path(output_dir), self._sharding.updated(model, optimizer)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        shards.write(folder, rank, updated)
        if is_first_rank():
            shards.write_index(folder, self._sharding.name, world_size(), updated)
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def restore(self, checkpoint: str | Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Goes on from a checkpoint's weights, optimizer and schedule, whatever number of ranks and way wrote it.

        Raises:
            CheckpointError: a file is damaged, or holds what this run does not train.
        """
        folder, updated = Path(checkpoint), self._sharding.updated(model, optimizer)
        if has_shards(folder):
            self._restore_shards(folder, updated)
        elif self._order:
            shards.fill(updated, shards.WholeState(folder / OPTIMIZER_NAME, self._order))
        else:
            raise CheckpointError(f"{folder} is of a run without DeepSpeed's own optimizer, which this one has.")
        self._sharding.take_written()
        saved = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        scheduler.load_state_dict(_of_groups(saved, scheduler.state_dict(), folder))
        for group, rate in zip(updated.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # as the schedule has left it

    def _restore_shards(self, folder: Path, updated: Updated) -> None:
        index, own = shards.read_index(folder), type(updated.optimizer).__name__
        if index.optimizer != own and not {index.optimizer, own} <= set(ADAM):
            raise CheckpointError(
                f"{folder} holds the state of the optimizer {index.optimizer}, and this run has {own}. Give the one "
                "that it was written with."
            )
        shards.read(folder, updated)
        if index.way == self._sharding.name and len(index.groups) == len(updated.optimizer.param_groups):
            for group, saved in zip(updated.optimizer.param_groups, index.groups, strict=True):
                group.update({key: value for key, value in saved.items() if key in group})
            updated.scaling.update(index.scaling)

    def restore_weights(self, checkpoint: str | Path, model: nn.Module, optimizer: Any) -> None:
        """Puts a checkpoint's weights into the model, and no more.

        Raises:
            CheckpointError: a file is damaged or missing.
        """
        shards.read(Path(checkpoint), self._sharding.updated(model, optimizer), weights_only=True)
        self._sharding.take_written()

    @torch.no_grad()
    def whole_weights(self, model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
        """Returns the whole state dict, gathered weight by weight, in host memory, in the types that the policy was
        given in. A collective operation.

        Args:
            keep: whether this rank wants it; others get an empty one.
        """
        whole: dict[int, torch.Tensor] = {}
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in _saved_tensors(model):
            if id(tensor) not in whole:
                gathered = self._full(name, tensor)
                whole[id(tensor)] = gathered.detach().to("cpu", copy=True) if keep else torch.empty(0)
            kept[name] = whole[id(tensor)]
        return kept if keep else {}

    def correct_config(self, folder: Path) -> None:
        """Makes the type in a saved ``config.json`` that of the saved weights; DeepSpeed may have cast the model."""
        path, given = folder / CONFIG_NAME, {*self._dtypes.values()}
        if not self._sharding.copies or len(given) != 1 or not path.is_file():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("dtype") != (dtype := str(given.pop()).removeprefix("torch.")):
            path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")

    def _full(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        given = self._dtypes.get(name, tensor.dtype)
        if not self._sharding.copies or given == tensor.dtype:
            return full(tensor)
        return self._sharding.full_trained(tensor).to(given)


@contextmanager
def unsharded_files(trainer: Any) -> Iterator[None]:
    """Inside, a `transformers.Trainer` reads and writes a model as it does without sharding: in its plain files."""
    with kept_attributes(trainer, "is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
        yield


def _of_groups(saved: dict[str, Any], own: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a schedule, which has lists with an entry for each group of parameters. DeepSpeed leaves out groups
    without parameters; what is equal for all groups is equal for those as well.
    """
    fitted = dict(saved)
    for name, entries in saved.items():
        if isinstance(entries, list) and len(entries) != len(own.get(name, entries)):
            if any(entry != entries[0] for entry in entries):
                raise CheckpointError(f"{folder} has other groups of parameters, with learning rates of their own.")
            fitted[name] = entries[:1] * len(own[name])
    return fitted


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is saved of a model: all parameters and buffers that last, or of one with adapters these."""
    wanted = _of_adapters(model) if is_peft_model(model) else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and (wanted is None or tensor.requires_grad or id(tensor) in wanted):
            yield name, tensor


def _of_adapters(model: nn.Module) -> set[int]:
    """The weights of adapters, and embeddings that adapters change: peft saves these whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    unwrapped: Any = model
    embeddings = (unwrapped.get_input_embeddings(), unwrapped.get_output_embeddings())
    return {
        id(tensor)
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, tensor in module.state_dict(keep_vars=True).items()
        if module in embeddings or not name.startswith(("base_layer.", "original_module."))
    }
