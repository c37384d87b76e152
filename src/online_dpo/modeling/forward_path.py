"""Finding out, on a few real completions, which fast ways to log-probabilities are right for the models at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import nn

from online_dpo.distributed.collectives import any_rank
from online_dpo.errors import named_error
from online_dpo.modeling.attention.masks import why_not_shared
from online_dpo.modeling.introspection import computing_dtype
from online_dpo.modeling.logprobs import can_chunk, row_logprobs
from online_dpo.modeling.tolerance import MOST_ROUNDING, ROUNDING
from online_dpo.packing.pack import pack_groups
from online_dpo.types import Group, PackedRows

logger = logging.getLogger(__name__)

ModelContext = Callable[[], AbstractContextManager[nn.Module]]
GROUPS, COMPLETIONS, TOKENS = 2, 4, 64


@dataclass(frozen=True)
class ForwardPath:
    """How log-probabilities are computed: from rows that share prompts or not, in chunks of the vocabulary or not."""

    shared: bool = False
    chunked: bool = False


@torch.no_grad()
def choose_path(
    models: Mapping[str, ModelContext], groups: Sequence[Group], share: bool
) -> tuple[ForwardPath, list[str]] | None:
    """The fastest path that gives every model the log-probabilities that it gives single sequences.

    The yardstick is each completion alone, without padding, through the model's own logits. A path passes when its
    mean difference to that is rounding: a constant of the dtype, or a few times what padding makes. Rounding can
    hide that a model ignores masks or positions; then wrong ones change nothing at all, and it does not pass either.

    Args:
        models: by name, what lends each model ready for a forward pass, in eval mode and the dtype of training.
        groups: of the run; the beginnings of some completions of the longest few are used.
        share: whether sharing prompts is wanted.

    Returns:
        The path, and what speaks against a faster one; ``None`` where nothing can be told, because log-probabilities
        are not finite or no completion is longer than a token.
    """
    chosen = sorted(groups, key=_size, reverse=True)[:GROUPS]
    sample = [_shortened(group) for group in chosen]
    if not any(len(c.token_ids) > 1 for group in sample for c in group.completions[1:]):
        return None
    path, reasons = ForwardPath(shared=share, chunked=True), []
    for name, model_context in models.items():
        with model_context() as model:
            check = _Check(model, sample)
            if not check.is_finite:
                return None
            if path.chunked and (why := check.chunked()):
                reasons.append(f"logits of {name} are not computed in chunks: {why}")
                path = replace(path, chunked=False)
            if path.shared and (why := check.shared(chunked=path.chunked)):
                reasons.append(f"prompts are not shared, because of {name}: {why}")
                path = replace(path, shared=False)
    return path, reasons


class PathChoice:
    """The path of a run: plain at first, and settled once, on all ranks alike."""

    def __init__(self, device: torch.device, share: bool) -> None:
        self.path = ForwardPath()
        self._device, self._share, self._settled = device, share, False

    def settle(self, models: Mapping[str, ModelContext], groups: Sequence[Group]) -> None:
        """Choose with the first groups there are on any rank, unless nothing can be told from them. A collective
        operation.
        """
        device = self._device
        if self._settled or not any_rank(bool(groups), device):
            return
        # A rank without groups has no objection.
        found = choose_path(models, groups, self._share) if groups else (ForwardPath(self._share, chunked=True), [])
        if any_rank(found is None, device) or found is None:
            return
        path, reasons = found
        self.path = ForwardPath(not any_rank(not path.shared, device), not any_rank(not path.chunked, device))
        self._settled = True
        for reason in reasons:
            logger.warning("Training takes a slower path: %s.", reason)


class _Check:
    """One model on one sample."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        singles = [Group(group.prompt, (completion,)) for group in groups for completion in group.completions]
        self.alone_M = torch.cat([self._logps(self._rows(False, [single]), False) for single in singles])
        self.is_finite = bool(self.alone_M.isfinite().all())
        padding = self._distance(self._rows(False, groups), False)
        rounding = ROUNDING[computing_dtype(self.model)]
        self.allowed = min(max(4 * padding, rounding), MOST_ROUNDING * rounding)

    def chunked(self) -> str | None:
        """What is wrong with chunks of the vocabulary; ``None`` if nothing."""
        if not can_chunk(self.model):
            return "it has no body and head that can be told apart"
        return self._why_wrong(self._rows(False, self.groups), chunked=True)

    def shared(self, chunked: bool) -> str | None:
        """What is wrong with sharing prompts; ``None`` if nothing."""
        if why := why_not_shared(self.model):
            return why
        rows = self._rows(True, self.groups)
        if why := self._why_wrong(rows, chunked):
            return why
        if torch.equal(self._logps(_without_branches(rows), chunked), self._logps(rows, chunked)):
            return "it does not heed who sees whom"
        plain = self._rows(False, self.groups)  # there the mask knows no positions
        if torch.equal(self._logps(_twice_as_far(plain), chunked), self._logps(plain, chunked)):
            return "it does not heed positions"
        return None

    def _why_wrong(self, rows: PackedRows, chunked: bool) -> str | None:
        try:
            found = self._distance(rows, chunked)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an unknown model does with such inputs
            return f"it fails with {named_error(error, first_line=True)}"
        if found <= self.allowed:
            return None
        return f"log-probabilities differ by {found:.1e} a token, where {self.allowed:.1e} could be rounding"

    def _distance(self, rows: PackedRows, chunked: bool) -> float:
        """Mean difference of a completion's tokens to the yardstick, of the completion that is furthest off."""
        difference_M = (self._logps(rows, chunked) - self.alone_M).abs()
        return max(float(part.mean()) for part in difference_M.split(rows.length_S.tolist()))

    def _logps(self, rows: PackedRows, chunked: bool) -> torch.Tensor:
        return row_logprobs(self.model, rows, entropy=False, chunked=chunked).token_logps_M

    def _rows(self, shared: bool, groups: Sequence[Group]) -> PackedRows:
        """Rows of all completions; groups that share prompts stand in a single one."""
        rows = pack_groups(groups, [], shared, capacity=sum(map(_size, groups)))
        return rows.to(next(self.model.parameters()).device)


def _without_branches(rows: PackedRows) -> PackedRows:
    """Every completion sees those before it."""
    return replace(rows, tokens=replace(rows.tokens, branch_RT=torch.zeros_like(rows.tokens.branch_RT)))


def _twice_as_far(rows: PackedRows) -> PackedRows:
    """Tokens stand twice as far from each other, up to the length of the longest row, which a model has places for."""
    positions_RT = rows.tokens.positions_RT
    return replace(
        rows, tokens=replace(rows.tokens, positions_RT=(2 * positions_RT).clamp(max=int(positions_RT.max())))
    )


def _shortened(group: Group) -> Group:
    """A few completions, and of each its beginning: the yardstick needs the logits of all their tokens at once."""
    kept = group.completions[:COMPLETIONS]
    return replace(group, completions=tuple(replace(c, token_ids=c.token_ids[:TOKENS]) for c in kept))


def _size(group: Group) -> int:
    return len(group.prompt.token_ids) + sum(len(completion.token_ids) for completion in group.completions)
