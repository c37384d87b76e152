"""The reference, which the loss pulls towards: the policy as it was before training, or following it from behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.modeling.borrowing import adapter_off, eval_mode
from online_dpo.modeling.loading import disable_dropout


class Reference:
    """Lends the reference model: inside ``active()`` a forward pass gives the reference's logits, inside ``at_start()``
    those that it had before training.

    One that does not change has nothing to do after a step, and nothing to save.
    """

    description: str

    def active(self) -> AbstractContextManager[nn.Module]:
        raise NotImplementedError

    def at_start(self) -> AbstractContextManager[nn.Module]:
        return self.active()

    def step_ended(self, step: int) -> None:
        """``step`` optimizer steps have been taken."""

    def save(self, folder: Path, rank: int) -> None:
        """Writes what `restore` needs, on rank 0."""

    def restore(self, folder: Path, rank: int) -> None:
        """Goes on from what `save` wrote."""


class FrozenReference(Reference):
    """A model of its own that is never trained."""

    def __init__(self, model: nn.Module, description: str) -> None:
        self.description = description
        self.model = model

    def active(self) -> AbstractContextManager[nn.Module]:
        return eval_mode(self.model)


class NoReference(Reference):
    """For losses that need none. It lends nothing, so nobody may ask."""

    description = "none"


class AdapterOffReference(Reference):
    """The policy with its adapter switched off: no second model in memory.

    Where other weights than the adapter's are trained (see `trains_base_weights`), it has to be a copy of the policy.
    """

    def __init__(self, policy: nn.Module, description: str = "the policy with its adapter off") -> None:
        self.policy, self.description = policy, description

    def active(self) -> AbstractContextManager[nn.Module]:
        return adapter_off(self.policy)


class SyncedReference(Reference):
    """A model of its own that follows the policy: every ``every`` steps, a share ``alpha`` of the policy is mixed into
    its weights (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656). With every step and a small share, an exponential
    average.

    Shares too small for a half-precision weight are not lost: such weights are mixed in fp32. The weights of the start
    are kept in host memory.

    Raises:
        ValueError: the two models have other parameters.
    """

    FILE = "reference.pt"

    def __init__(self, model: nn.Module, policy: nn.Module, alpha: float, every: int, description: str) -> None:
        if _shapes(model) != _shapes(policy):
            raise ValueError(
                "`sync_ref_model` mixes the policy into the reference, so both need the same parameters, and no "
                "adapter. Give a `ref_model` of the same kind, or leave it off."
            )
        self.description = f"{description}, {alpha} of the policy mixed in every {every} steps"
        self.model = model
        self._policy, self._alpha, self._every = policy, alpha, every
        # fp32 ones are the model's own
        self._weights = {name: p.detach().float() for name, p in model.named_parameters()}
        self._start = self._copies()

    def active(self) -> AbstractContextManager[nn.Module]:
        return eval_mode(self.model)

    @contextmanager
    def at_start(self) -> Iterator[nn.Module]:
        now = self._copies()
        self._set(self._start)
        try:
            with eval_mode(self.model):
                yield self.model
        finally:
            self._set(now)

    @torch.no_grad()
    def step_ended(self, step: int) -> None:
        if step % self._every:
            return
        policy = dict(self._policy.named_parameters())
        for name, parameter in self.model.named_parameters():
            weight = self._weights[name].lerp_(policy[name].float(), self._alpha)
            parameter.copy_(weight)

    def save(self, folder: Path, rank: int) -> None:
        if rank == 0:
            torch.save(self._copies(), folder / self.FILE)

    def restore(self, folder: Path, rank: int) -> None:
        self._set(torch.load(folder / self.FILE, map_location="cpu"))

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: weight.to("cpu", copy=True) for name, weight in self._weights.items()}

    @torch.no_grad()
    def _set(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            self._weights[name].copy_(weights[name])
            parameter.copy_(self._weights[name])


class ReferenceSteps(TrainerCallback):
    """Tells the reference when a step has ended."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._reference.step_ended(state.global_step)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it stands, without dropout and without gradients."""
    reference = copy.deepcopy(policy)
    disable_dropout(reference)
    return reference.eval().requires_grad_(False)


def trains_base_weights(policy: nn.Module) -> bool:
    """Whether a PEFT model has trainable weights that stay in use while its adapters are off, such as biases."""
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
    """Whether the policy with its adapter differs from the policy without, on a few tokens.

    A fresh LoRA adapter changes nothing, so "adapter off" is the starting policy. One that has been trained before
    does.
    """
    device = next(policy.parameters()).device
    ids = torch.arange(4, device=device)[None]
    with eval_mode(policy):
        with_adapter = policy(input_ids=ids).logits
    with adapter_off(policy):
        without = policy(input_ids=ids).logits
    return not torch.allclose(with_adapter, without, rtol=1e-4, atol=1e-5)
