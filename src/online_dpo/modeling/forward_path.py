"""The start-up check: which fast ways to compute log-probabilities are right for these models, tried on a few real
completions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from online_dpo.distributed.collectives import any_rank
from online_dpo.distributed.device_memory import free_kept_memory
from online_dpo.errors import is_out_of_memory, named_error
from online_dpo.modeling.attention.choice import use_sdpa, uses_flex_attention
from online_dpo.modeling.attention.masks import why_not_shared
from online_dpo.modeling.borrowing import ModelContext
from online_dpo.modeling.introspection import computing_dtype
from online_dpo.modeling.logprobs import can_chunk, row_logprobs
from online_dpo.modeling.memory import in_memory
from online_dpo.modeling.tolerance import ROUNDING, allowed_difference
from online_dpo.packing.pack import pack_groups
from online_dpo.types import Group, PackedRows

logger = logging.getLogger(__name__)

GROUPS, COMPLETIONS, TOKENS = 2, 4, 64


@dataclass(frozen=True)
class ForwardPath:
    """How log-probabilities are computed: from rows that share prompts (``shared``) or padded sequences, and with
    logits in chunks (``chunked``) or all at once. With ``flex``, all models read shared rows through FlexAttention, so
    that rows may hold many prompts.
    """

    shared: bool = False
    chunked: bool = False
    flex: bool = False


@torch.no_grad()
def choose_path(
    models: Mapping[str, ModelContext], groups: Sequence[Group], share: bool
) -> tuple[ForwardPath, list[str]] | None:
    """The fastest path with which every model gives the same log-probabilities as for single sequences.

    Each path is compared with every completion computed alone, without padding, from the model's own logits. It passes
    if the mean difference can be rounding error: a constant of the dtype, or a few times what padding changes
    (`allowed_difference`). In half precision, rounding error can hide that a model ignores the attention mask or
    position ids. So wrong ones are tried as well: if they change nothing at all, the path does not pass.

    Args:
        models: by name, a context for each model that makes it ready for a forward pass: in eval mode, and in the
            precision of training.
        groups: groups of the run; the beginnings of some completions of the longest few are used.
        share: whether sharing prompts is wanted.

    Returns:
        The path, and the reasons why it is not a faster one; ``None`` if nothing can be decided, because
        log-probabilities are not finite, no completion has more than one token, or memory runs out even with two
        completions of the shortest group.
    """
    chosen = sorted(groups, key=_size, reverse=True)[:GROUPS]
    sample = [_shortened(group) for group in chosen]
    smallest = min(groups, key=_size)
    for tried in (sample, [replace(_shortened(smallest), completions=_shortened(smallest).completions[:2])]):
        if not any(len(c.token_ids) > 1 for group in tried for c in group.completions[1:]):
            return None
        with in_memory() as attempt:
            return _choose_path(models, tried, share)
        assert not attempt.fits
        free_kept_memory()
    return None


def _choose_path(
    models: Mapping[str, ModelContext], sample: Sequence[Group], share: bool
) -> tuple[ForwardPath, list[str]] | None:
    path, reasons = ForwardPath(shared=share, chunked=True), []
    for name, model_context in models.items():
        with model_context() as model:
            check = _PathCheck(model, sample)
            if not check.is_finite:
                return None
            if path.chunked and (why := check.why_not_chunked()):
                reasons.append(f"logits of {name} are not computed in chunks: {why}")
                path = replace(path, chunked=False)
            if path.shared and not _can_share(check, name, path.chunked, reasons):
                path = replace(path, shared=False)
    return path, reasons


def _can_share(check: _PathCheck, name: str, chunked: bool, reasons: list[str]) -> bool:
    """Whether rows that share prompts are right for the model. Where they are not through FlexAttention, its attention
    becomes SDPA.
    """
    why = check.why_not_shared(chunked)
    if why is not None and uses_flex_attention(check.model):
        reasons.append(f"{name} is read through SDPA, not FlexAttention: {why}")
        use_sdpa(check.model)
        why = check.why_not_shared(chunked)
    if why is not None:
        reasons.append(f"prompts are not shared, because of {name}: {why}")
    return why is None


class PathChoice:
    """The path of a run: the plain one at first, then chosen once, the same on all ranks."""

    def __init__(self, device: torch.device, share: bool, needs_flex: bool = False) -> None:
        self.path = ForwardPath()
        self._device, self._share, self._needs_flex, self.settled = device, share, needs_flex, False

    def settle(self, models: Mapping[str, ModelContext], groups: Sequence[Group]) -> None:
        """Chooses the path, at the first call in which groups decide it. A collective operation: it is fast only if it
        is right on every rank.

        Raises:
            ValueError: FlexAttention is demanded (``needs_flex``), and is wrong or fails.
        """
        device = self._device
        if self.settled or not any_rank(bool(groups), device):
            return
        # A rank without groups cannot find anything wrong with the fastest path.
        choice = choose_path(models, groups, self._share) if groups else (ForwardPath(self._share, chunked=True), [])
        if any_rank(choice is None, device) or choice is None:
            return
        path, reasons = choice
        shared, chunked = (not any_rank(not on, device) for on in (path.shared, path.chunked))
        flex = self._agree_on_flex(models)
        self.path = ForwardPath(shared, chunked, shared and flex)
        self.settled = True
        for reason in reasons:
            logger.warning("Training takes a slower path: %s.", reason)
        if self._needs_flex and not self.path.flex:
            told = "; ".join(reasons) or "it fails on another rank"
            raise ValueError(f"`flex_attention=True` cannot be used: {told}. Leave it unset.")

    def _agree_on_flex(self, models: Mapping[str, ModelContext]) -> bool:
        """Whether all models use FlexAttention on every rank; a model that cannot on one rank, does not on any. A
        collective operation.
        """
        all_use = True
        for model_context in models.values():
            with model_context() as model:
                if any_rank(not uses_flex_attention(model), self._device):
                    all_use = False
                    if uses_flex_attention(model):
                        use_sdpa(model)
        return all_use


class _PathCheck:
    """The check of one model on a few groups. ``allowed`` is the difference that may be rounding error."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        singles = [Group(group.prompt, (completion,)) for group in groups for completion in group.completions]
        self.single_logps_M = torch.cat([self._logps(self._rows(False, [single]), False) for single in singles])
        self.is_finite = bool(self.single_logps_M.isfinite().all())
        padding = self._difference(self._rows(False, groups), False)
        self.allowed = allowed_difference(padding, ROUNDING[computing_dtype(self.model)])

    def why_not_chunked(self) -> str | None:
        """Why logits in chunks are wrong for the model; ``None`` if they are right."""
        if not can_chunk(self.model):
            return "its body and its head cannot be called separately"
        return self._why_wrong(self._rows(False, self.groups), chunked=True)

    def why_not_shared(self, chunked: bool) -> str | None:
        """Why rows that share prompts are wrong for the model; ``None`` if they are right."""
        if why := why_not_shared(self.model):
            return why
        rows = self._rows(True, self.groups)
        if why := self._why_wrong(rows, chunked):
            return why
        if torch.equal(self._logps(_without_branch_mask(rows), chunked), self._logps(rows, chunked)):
            return "it ignores the attention mask"
        # On padded rows, whose mask does not depend on positions: a sliding window would change with them.
        padded = self._rows(False, self.groups)
        if torch.equal(self._logps(_with_doubled_positions(padded), chunked), self._logps(padded, chunked)):
            return "it ignores position ids"
        return None

    def _why_wrong(self, rows: PackedRows, chunked: bool) -> str | None:
        """Why log-probabilities from these rows are wrong; ``None`` if they are right."""
        try:
            difference = self._difference(rows, chunked)
        except Exception as error:  # the model's code is unknown, so any exception means that the path cannot be used
            if is_out_of_memory(error):
                raise
            return f"it fails with {named_error(error, first_line=True)}"
        if difference <= self.allowed:
            return None
        return f"log-probabilities differ by {difference:.1e} a token, where {self.allowed:.1e} could be rounding"

    def _difference(self, rows: PackedRows, chunked: bool) -> float:
        """The difference to single sequences, as the mean over the tokens of the completion that differs most."""
        difference_M = (self._logps(rows, chunked) - self.single_logps_M).abs()
        return max(float(part.mean()) for part in difference_M.split(rows.length_S.tolist()))

    def _logps(self, rows: PackedRows, chunked: bool) -> torch.Tensor:
        return row_logprobs(self.model, rows, entropy=False, chunked=chunked).token_logps_M

    def _rows(self, shared: bool, groups: Sequence[Group]) -> PackedRows:
        """Rows of all completions of the groups: one row for all if ``shared``, else one for each."""
        rows = pack_groups(groups, [], shared, capacity=sum(map(_size, groups)))
        return rows.to(next(self.model.parameters()).device)


def _without_branch_mask(rows: PackedRows) -> PackedRows:
    """The rows with a wrong attention mask: each completion also attends to the completions before it."""
    return replace(rows, tokens=replace(rows.tokens, branch_RT=torch.zeros_like(rows.tokens.branch_RT)))


def _with_doubled_positions(rows: PackedRows) -> PackedRows:
    """The rows with wrong position ids: doubled, but no higher than the highest, so that the model has all of them."""
    positions_RT = rows.tokens.positions_RT
    return replace(
        rows, tokens=replace(rows.tokens, positions_RT=(2 * positions_RT).clamp(max=int(positions_RT.max())))
    )


def _shortened(group: Group) -> Group:
    """The group with a few completions, cut after some tokens: the check needs all of their logits at once."""
    kept = group.completions[:COMPLETIONS]
    return replace(group, completions=tuple(replace(c, token_ids=c.token_ids[:TOKENS]) for c in kept))


def _size(group: Group) -> int:
    """The number of tokens of a group when its prompt is stored once."""
    return len(group.prompt.token_ids) + sum(len(completion.token_ids) for completion in group.completions)
