"""Weights that are not finite: found at the start of a run and before they are saved, and never written to a disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState

from online_dpo.checkpoints.folders import by_age, checkpoints_in, located
from online_dpo.checkpoints.manifest import problem_of
from online_dpo.distributed.collectives import any_rank, from_every_rank
from online_dpo.distributed.weights import part
from online_dpo.errors import TrainingDivergedError
from online_dpo.modeling.quantization import named_numbers

Named = Iterable[tuple[str, torch.Tensor]]

ADVICE = "Try a lower learning rate, gradient clipping (`max_grad_norm`), or bf16 or fp32 in place of fp16."


class FiniteWeights:
    """Checks that what a run saves is finite: parameters and floating buffers of its models, and the optimizer's state.

    A step is skipped if its gradient is not finite, and yet weights can become so: an update overflows, or a callback
    writes to them. Buffers that hold infinities at the start, such as masks, are left out.

    One reduction for each tensor runs on its device, and one number comes back for each device. Each rank looks at what
    it holds; ``agree`` below makes a finding of one rank that of all, and is then a collective operation.

    Args:
        device: of this process.
        optimizer: returns the optimizer, ``None`` before there is one.
    """

    def __init__(self, device: torch.device, optimizer: Callable[[], Any]) -> None:
        self._device, self._optimizer = device, optimizer
        self._models: dict[str, nn.Module] = {}
        self._frozen: dict[str, nn.Module] = {}
        self._infinite_by_design: set[str] = set()
        self.found = False
        """Whether a check of this run has failed: what it holds must not be saved."""

    def add(self, name: str, model: nn.Module, frozen: bool = False) -> None:
        """Add a model whose weights are checked, by its name in messages, such as "the policy"; a frozen one is checked
        at the start alone.
        """
        (self._frozen if frozen else self._models)[name] = model

    def check_start(self) -> None:
        """Check the weights that a run starts from, on every rank; a collective operation.

        Raises:
            ValueError: a parameter is not finite.
        """
        self.found = False
        buffers = _buffers(self._models)
        self._infinite_by_design = {name for name, buffer in buffers if not _all_finite([(name, buffer)])}
        problem = self._problem([*self._weights(), *_parameters(self._frozen)], agree=True)
        if problem is not None:
            raise ValueError(
                f"The weights to start from are not finite: {problem}. Nothing can be trained from them; give a model "
                "or a checkpoint that is whole, and load it in a type that holds its weights (`dtype`)."
            )

    def check(self, state: TrainerState, output_dir: str, when: str, *, agree: bool, optimizer: bool = True) -> None:
        """Check the weights, and the optimizer's state, as they are now.

        Args:
            when: begins the message: "Before a save".
            agree: whether all ranks take part.
            optimizer: whether the optimizer's state is checked as well.

        Raises:
            TrainingDivergedError: one of them is not finite. The message names it, and the last checkpoint on the disk
                whose weights are finite.
        """
        tensors = [*self._weights(), *(self._optimizer_state() if optimizer else ())]
        problem = self._problem(tensors, agree)
        if problem is None:
            return
        self.found = True
        folder = last_finite_checkpoint(Path(output_dir))
        where = "No checkpoint has finite weights." if folder is None else f"The last finite weights are in {folder}."
        raise TrainingDivergedError(
            f"{when}, after step {state.global_step}, the weights are not finite: {problem}. They were not saved. "
            f"{where} {ADVICE}"
        )

    def _problem(self, tensors: Named, agree: bool) -> str | None:
        own = describe_not_finite(tensors)
        if not agree:
            return own
        if not any_rank(own is not None, self._device):
            return None
        return next(problem for problem in from_every_rank(own) if problem is not None)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from _parameters(self._models)
        for name, buffer in _buffers(self._models):
            if name not in self._infinite_by_design:
                yield name, buffer

    def _optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        names = {id(p): name for model in self._models.values() for name, p in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            if isinstance(state, dict):
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        yield f"the optimizer's `{key}` of `{names.get(id(parameter), 'a weight')}`", value


def _parameters(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for owner, model in models.items():
        for name, tensor in named_numbers(model):
            yield f"`{name}` of {owner}", tensor


def _buffers(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for owner, model in models.items():
        for name, tensor in model.named_buffers():
            yield f"`{name}` of {owner}", tensor


def describe_not_finite(tensors: Named) -> str | None:
    """The first tensor that holds a number which is not finite, with how many; ``None`` if all are finite."""
    named = list(tensors)
    if _all_finite(named):
        return None
    name, tensor = next((name, tensor) for name, tensor in named if not _all_finite([(name, tensor)]))
    bad = int((~part(tensor).isfinite()).sum())
    return f"{name} holds {bad} of {part(tensor).numel()} numbers that are NaN or infinite"


def _all_finite(tensors: Named) -> bool:
    """Whether all floating-point tensors are finite. Types of 8 bits are left out: torch cannot reduce them."""
    ends: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for _, tensor in tensors:
        own = part(tensor)
        if own.is_floating_point() and own.itemsize > 1 and own.numel() and not own.is_meta:
            # NaN spreads through both, and unlike a sum they cannot overflow. On a CPU 16 times as fast as a norm.
            least, most = torch.aminmax(own)
            ends[own.device].append(least.isfinite() & most.isfinite())
    return all(bool(torch.stack(finite).all()) for finite in ends.values())


def last_finite_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a folder whose weights are finite; each is read to find out."""
    known = by_age(output_dir)
    unknown = [folder for folder in checkpoints_in(output_dir) if folder not in known]  # of an earlier version
    whole = (folder for folder in reversed(known) if problem_of(located(folder)) is None)
    return next((folder for folder in (*whole, *reversed(unknown)) if _holds_finite_weights(located(folder))), None)


def _holds_finite_weights(folder: Path) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    try:
        return bool(files) and all(_all_finite([*_tensors_of(file)]) for file in files)
    except (OSError, SafetensorError):
        return False


def _tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)
