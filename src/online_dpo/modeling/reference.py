"""The reference model of the loss: the policy as it was before training, or a slowly updated copy of the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.distributed.weights import full_of_part, is_sharded, own_part, part, shape_of
from online_dpo.errors import CheckpointError
from online_dpo.modeling.borrowing import adapter_off, eval_mode
from online_dpo.modeling.loading import disable_dropout


class Reference:
    """Gives access to the reference model. ``description`` is for the log and the model card.

    A reference with constant weights needs no more than `active`: the other methods do nothing by default.
    """

    description: str
    model: nn.Module | None = None
    """The model itself, where it is another than the policy."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """The model itself, where it is another than the policy; else nothing."""
        return [] if self.model is None else [self.model]

    def active(self) -> AbstractContextManager[nn.Module]:
        """Inside, a forward pass of the model that the context yields gives the reference's present logits."""
        raise NotImplementedError

    def at_start(self) -> AbstractContextManager[nn.Module]:
        """Inside, a forward pass gives the logits that the reference had before training."""
        return self.active()

    def update_after_step(self, step: int) -> None:
        """Updates the weights of the reference after optimizer step ``step``, if they are to follow the policy."""

    def files(self, rank: int) -> Sequence[str]:
        """Returns the names of the files that `save` writes, none by default."""
        return []

    def save(self, folder: Path, rank: int) -> None:
        """Writes what `restore` needs to a checkpoint's folder, on rank 0."""

    def restore(self, folder: Path, rank: int) -> None:
        """Continues from what `save` wrote."""


class FrozenReference(Reference):
    """A separate model that is never trained."""

    model: nn.Module

    def __init__(self, model: nn.Module, description: str) -> None:
        self.description = description
        self.model = model

    def active(self) -> AbstractContextManager[nn.Module]:
        """Inside, the model is in evaluation mode."""
        return eval_mode(self.model)


class NoReference(Reference):
    """The absence of a reference, for losses that need none. Its `active` must not be called."""

    description = "none"


class AdapterOffReference(Reference):
    """The policy with its adapter disabled, so that no second model is in memory.

    If base weights are trained as well (see `trains_base_weights`), the reference must be a copy of the policy instead.
    """

    def __init__(self, policy: nn.Module, description: str = "the policy with its adapter off") -> None:
        self.policy, self.description = policy, description

    def active(self) -> AbstractContextManager[nn.Module]:
        """Inside, the policy is in evaluation mode with its adapter disabled."""
        return adapter_off(self.policy)


class SyncedReference(Reference):
    """A separate model whose weights follow the policy: every ``every`` steps they become ``(1 - alpha)`` times
    themselves plus ``alpha`` times the policy's (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656). With an update in
    every step and a small ``alpha``, this is an exponential moving average.

    Half-precision weights are also kept, and updated, in fp32, so that small updates are not rounded away. The initial
    weights are kept in host memory, for `at_start`.

    Raises:
        ValueError: the parameters of the two models have different names or shapes.
    """

    FILE = "reference.safetensors"
    model: nn.Module

    def __init__(self, model: nn.Module, policy: nn.Module, alpha: float, every: int, description: str) -> None:
        if _shapes(model) != _shapes(policy):
            raise ValueError(
                "`sync_ref_model` mixes the policy's weights into the reference, so both need the same parameters, and "
                "no adapter. Give a `ref_model` with the policy's architecture, or leave `sync_ref_model` off."
            )
        self.description = f"{description}, {alpha} of the policy mixed in every {every} steps"
        self.model = model
        self._policy, self._alpha, self._every = policy, alpha, every
        # Of sharded models, this rank's parts. `float()` copies half-precision weights only: fp32 ones share their
        # memory with the model's parameters.
        self._weights = {name: part(p).float() for name, p in model.named_parameters()}
        self._start = self._copies()

    def active(self) -> AbstractContextManager[nn.Module]:
        """Inside, the model is in evaluation mode, with its present weights."""
        return eval_mode(self.model)

    @contextmanager
    def at_start(self) -> Iterator[nn.Module]:
        """Inside, the model has its initial weights; at the end, its present ones again."""
        now = self._copies()
        self._set(self._start)
        try:
            with eval_mode(self.model):
                yield self.model
        finally:
            self._set(now)

    @torch.no_grad()
    def update_after_step(self, step: int) -> None:
        """Mixes the policy's weights in, if ``step`` is a multiple of ``every``."""
        if step % self._every:
            return
        policy = dict(self._policy.named_parameters())
        for name, parameter in self.model.named_parameters():
            weight = self._weights[name].lerp_(part(policy[name]).float(), self._alpha)
            part(parameter).copy_(weight)

    def files(self, rank: int) -> Sequence[str]:
        """Returns the name of the file with the present weights."""
        return [self.FILE]

    def save(self, folder: Path, rank: int) -> None:
        """Writes the present weights, in fp32, to ``reference.safetensors``, on rank 0."""
        weights = self._copies() if not is_sharded(self.model) else self._whole_weights(keep=rank == 0)
        if rank == 0:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / self.FILE)

    def restore(self, folder: Path, rank: int) -> None:
        """Reads the present weights from ``reference.safetensors``.

        Raises:
            CheckpointError: the file is damaged, or holds other weights than this reference has.
        """
        try:
            weights = load_file(folder / self.FILE)
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{folder / self.FILE} is damaged ({problem}). Give another checkpoint.") from None
        if {name: weight.shape for name, weight in weights.items()} != _shapes(self.model):
            raise CheckpointError(f"{folder / self.FILE} holds other weights than the reference has.")
        for name, parameter in self.model.named_parameters():
            self._weights[name].copy_(own_part(parameter, weights[name]))
            part(parameter).copy_(self._weights[name])

    def _whole_weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """The whole weights, gathered one by one, in host memory; a collective operation."""
        whole = ((name, full_of_part(p, self._weights[name])) for name, p in self.model.named_parameters())
        return {name: weight.cpu() for name, weight in whole if keep}

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: weight.to("cpu", copy=True) for name, weight in self._weights.items()}

    @torch.no_grad()
    def _set(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            self._weights[name].copy_(weights[name])
            part(parameter).copy_(self._weights[name])


class ReferenceSteps(TrainerCallback):
    """A callback that lets the reference update its weights after each optimizer step."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Updates the reference."""
        self._reference.update_after_step(state.global_step)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: shape_of(parameter) for name, parameter in model.named_parameters()}


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy with its present weights, without dropout and without gradients."""
    reference = copy.deepcopy(policy)
    disable_dropout(reference)
    return reference.eval().requires_grad_(False)


def trains_base_weights(policy: nn.Module) -> bool:
    """Whether a PEFT model has trainable weights that stay in use while its adapters are disabled, such as biases."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    of_adapters = {
        parameter
        for module in policy.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, parameter in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    return any(parameter.requires_grad and parameter not in of_adapters for parameter in policy.parameters())


@torch.no_grad()
def adapter_changes_output(policy: nn.Module) -> bool:
    """Whether the policy's logits with its adapter differ from those without, found on a few tokens.

    A new LoRA adapter changes nothing (its B is zero), so the policy with its adapter disabled is the initial policy.
    With an adapter that has been trained before it is not.
    """
    device = next(policy.parameters()).device
    ids = torch.arange(4, device=device)[None]
    with eval_mode(policy):
        with_adapter = policy(input_ids=ids).logits
    with adapter_off(policy):
        without = policy(input_ids=ids).logits
    return not torch.allclose(with_adapter, without, rtol=1e-4, atol=1e-5)
