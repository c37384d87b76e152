"""Finding out, on a few real completions, which fast ways to log-probabilities are right for the models at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from online_dpo.attention import why_not_shared
from online_dpo.logprobs import can_chunk, row_logprobs
from online_dpo.packing import STAND_IN, pack_groups
from online_dpo.types import Group

logger = logging.getLogger(__name__)

Lender = Callable[[], AbstractContextManager[nn.Module]]
GROUPS, COMPLETIONS = 2, 4
ROUNDING = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Mean difference in nats a token that rounding alone may make."""
MOST_ROUNDING = 4
"""Padding may show that a model rounds more coarsely than that, but not by more than this factor: a model that sees the
padding differs as well.
"""


@dataclass(frozen=True)
class Method:
    """How log-probabilities are computed: from rows that share prompts or not, in chunks of the vocabulary or not."""

    shared: bool = False
    chunked: bool = False


@torch.no_grad()
def choose_method(models: Mapping[str, Lender], groups: Sequence[Group], share: bool) -> tuple[Method, list[str]]:
    """The fastest method that gives every model the log-probabilities that it gives single sequences.

    The yardstick is each completion alone, without padding, through the model's own logits. A method passes when its
    mean difference to that is rounding: a constant of the dtype, or a few times what padding makes.

    Args:
        models: by name, what lends each model ready for a forward pass, in eval mode and the dtype of training.
        groups: of the run; the longest few are used.
        share: whether sharing prompts is wanted.

    Returns:
        The method, and what speaks against a faster one.
    """
    chosen = sorted(groups, key=_size, reverse=True)[:GROUPS]
    sample = [replace(group, completions=group.completions[:COMPLETIONS]) for group in chosen]
    method, reasons = Method(shared=share, chunked=True), []
    for name, lend in models.items():
        with lend() as model:
            check = _Check(model, sample)
            if method.chunked and (why := check.chunked()):
                reasons.append(f"logits of {name} are not computed in chunks: {why}")
                method = replace(method, chunked=False)
            if method.shared and (why := check.shared()):
                reasons.append(f"prompts are not shared, because of {name}: {why}")
                method = replace(method, shared=False)
    return method, reasons


class MethodChoice:
    """The method of a run: plain at first, and settled once, on all ranks alike."""

    def __init__(self, accelerator: Accelerator, share: bool) -> None:
        self.method = Method()
        self._accelerator, self._share, self._settled = accelerator, share, False

    def settle(self, models: Mapping[str, Lender], groups: Sequence[Group]) -> None:
        """Choose with the first groups there are on any rank. A collective operation."""
        if self._settled or not self._any_rank(bool(groups)):
            return
        method, reasons = choose_method(models, groups or [STAND_IN], self._share)
        self.method = Method(not self._any_rank(not method.shared), not self._any_rank(not method.chunked))
        self._settled = True
        for reason in reasons:
            logger.warning("Training takes a slower path: %s.", reason)

    def _any_rank(self, holds: bool) -> bool:
        ranks = self._accelerator.reduce(torch.tensor(float(holds), device=self._accelerator.device), reduction="sum")
        return bool(ranks)  # pyright: ignore[reportArgumentType]


class _Check:
    """One model on one sample."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        singles = [Group(group.prompt, (completion,)) for group in groups for completion in group.completions]
        self.alone_M = torch.cat([self._logps(Method(), [single]) for single in singles])
        padding = (self._logps(Method(), groups) - self.alone_M).abs().mean()
        rounding = ROUNDING[self._dtype()]
        self.allowed = min(max(4 * float(padding), rounding), MOST_ROUNDING * rounding)

    def chunked(self) -> str | None:
        """What is wrong with chunks of the vocabulary; ``None`` if nothing."""
        if not can_chunk(self.model):
            return "it has no body and head that can be told apart"
        return self._difference(Method(chunked=True))

    def shared(self) -> str | None:
        """What is wrong with sharing prompts; ``None`` if nothing."""
        return why_not_shared(self.model) or self._difference(Method(shared=True))

    def _difference(self, method: Method) -> str | None:
        try:
            found = float((self._logps(method, self.groups) - self.alone_M).abs().mean())
        except Exception as error:  # whatever an unknown model does with such inputs
            return f"it fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if found <= self.allowed:
            return None
        return f"log-probabilities differ by {found:.1e} a token, where {self.allowed:.1e} could be rounding"

    def _logps(self, method: Method, groups: Sequence[Group]) -> torch.Tensor:
        """Log-probabilities of all completions' tokens; groups that share prompts stand in a single row."""
        rows = pack_groups(groups, [], method.shared, capacity=sum(map(_size, groups)))
        rows = rows.to(next(self.model.parameters()).device)
        return row_logprobs(self.model, rows, entropy=False, chunked=method.chunked).token_logps_M

    def _dtype(self) -> torch.dtype:
        device = next(self.model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def _size(group: Group) -> int:
    return len(group.prompt.token_ids) + sum(len(completion.token_ids) for completion in group.completions)
