"""The reference: the policy as it was before training, which the loss pulls towards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from online_dpo.models import disable_dropout, eval_mode


class Reference(Protocol):
    """Lends the reference model: inside ``active()`` a forward pass gives the reference's logits."""

    description: str

    def active(self) -> AbstractContextManager[nn.Module]: ...


class FrozenReference:
    """A model of its own that is never trained."""

    def __init__(self, model: nn.Module, description: str) -> None:
        self.description = description
        self.model = model.eval().requires_grad_(False)

    def active(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)


class AdapterOffReference:
    """The policy with its adapter switched off: no second model in memory."""

    description = "the policy with its adapter off"

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with eval_mode(self.policy), self.policy.disable_adapter():  # pyright: ignore[reportCallIssue]
            yield self.policy


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it stands, without dropout and without gradients."""
    reference = copy.deepcopy(policy)
    disable_dropout(reference)
    return reference.eval().requires_grad_(False)


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
        with policy.disable_adapter():  # pyright: ignore[reportCallIssue]
            without = policy(input_ids=ids).logits
    return not torch.allclose(with_adapter, without, rtol=1e-4, atol=1e-5)
