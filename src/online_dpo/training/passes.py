"""Forward and backward passes of a micro-batch: split in two where memory runs out, and then made again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from online_dpo.distributed.agreement import Agreement
from online_dpo.distributed.collectives import RankErrors, from_every_rank
from online_dpo.modeling.memory import DoesNotFit
from online_dpo.packing.microbatches import halve, token_count
from online_dpo.packing.pack import stand_in
from online_dpo.runs import events
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.stopwatch import PhaseTimer
from online_dpo.types import PackedRows

logger = logging.getLogger(__name__)

Pass = Callable[[PackedRows, bool], torch.Tensor]
"""One forward and backward pass; returns the loss, without gradient. The second argument says whether it is the last
one of the optimizer step, in which ranks exchange gradients."""


@dataclass(frozen=True)
class Misfit:
    """What did not fit in the memory of a rank: the size of the pass, and what the error said."""

    pairs: int
    tokens: int
    width: int
    reason: str

    def error(self) -> DoesNotFit:
        """Returns the error that says what to lower."""
        return DoesNotFit(
            f"A pass of {self.pairs} pair(s), in rows of {self.width} tokens, does not fit in memory and cannot be "
            f"split here ({self.reason}). Lower `max_tokens_per_pass` (which splits micro-batches of several pairs), "
            "`max_length` or `max_new_tokens`."
        )


class PassRunner:
    """Runs the passes of an optimizer step so that each fits in memory, with the same gradient in the end.

    A backward pass that ran out of memory leaves part of its gradient behind. So all gradients of the step are dropped
    and its passes are run again. From then on no pass has more than half of the tokens that did not fit, unless it is a
    single pair; that is tried once more, for memory has been freed meanwhile. Where there are several ranks, all do so
    if memory ran out on any; each makes equally many passes.

    Args:
        metrics: where passes record; what an abandoned pass has recorded is taken back.
        row_capacity: returns the tokens of a row when a pass is split.
        agreement: ends a pass on all ranks where it does not fit on one.
        errors: ends the run on all ranks where nothing can be split.
        abandon: makes the model ready for another pass after one that did not end, and drops the step's gradients.
        free_memory: gives back memory that is kept between calls, such as the sampler's.
    """

    def __init__(
        self,
        metrics: MetricStore,
        phase: PhaseTimer,
        row_capacity: Callable[[], int],
        agreement: Agreement,
        errors: RankErrors,
        abandon: Callable[[], None],
        free_memory: Callable[[], None],
    ) -> None:
        self._metrics, self._phase, self._row_capacity = metrics, phase, row_capacity
        self._agreement, self._errors = agreement, errors
        self._abandon, self._free_memory = abandon, free_memory
        self._done: list[PackedRows] = []
        self._misfit: Misfit | None = None
        self._tried_again = self._needs_all = False
        self.tokens_that_fit = sys.maxsize

    def begin_step(self) -> None:
        """Forgets the passes of the step before. Where a single pair once needed memory that had to be freed for it,
        that is freed now, so that no pass fails in each step.
        """
        self._done = []
        self._tried_again = False
        if self._needs_all:
            self._free_memory()

    def run(self, rows: PackedRows, one_pass: Pass, last: bool = True) -> torch.Tensor:
        """Runs one pass, or as many as fit in memory, and returns the sum of their losses. A collective operation.

        Args:
            last: whether it is the last one of the optimizer step.

        Raises:
            DoesNotFit: a single pair does not fit on one of the ranks; raised on all.
        """
        before = self._metrics.snapshot()
        loss = self._run_parts(rows, one_pass, last)
        while loss is None:
            self._abandon()
            self._free_memory()
            self._lower_limit()
            again = all(self._run_parts(done, one_pass) is not None for done in self._done)
            self._metrics.restore(before)  # those were recorded the first time
            loss = self._run_parts(rows, one_pass, last) if again else None
        self._done.append(rows)
        return loss

    def _run_parts(self, rows: PackedRows, one_pass: Pass, last: bool = False) -> torch.Tensor | None:
        """Returns ``None`` if memory ran out on any rank."""
        parts, losses = self._parts(rows), []
        for number, part in enumerate(parts, start=1):
            with self._phase("training"), self._agreement.one_pass() as attempt:
                losses.append(one_pass(part, last and number == len(parts)))
            if not attempt.fits:
                width = part.tokens.ids_RT.shape[1]
                size = Misfit(len(part.pairs), token_count(part.pairs), width, attempt.reason)
                self._misfit = size if attempt.failed_here else None
                return None
        return torch.stack(losses).sum()

    def _parts(self, rows: PackedRows) -> list[PackedRows]:
        """Passes of at most `tokens_that_fit` tokens or one pair, equally many on all ranks."""
        if self.tokens_that_fit == sys.maxsize:
            return [rows]
        parts = self._split(rows)
        most = max(from_every_rank(len(parts), self._agreement.group))
        return parts + [stand_in(rows.tokens.shares_prompts)] * (most - len(parts))

    def _split(self, rows: PackedRows) -> list[PackedRows]:
        if len(rows.pairs) < 2 or token_count(rows.pairs) <= self.tokens_that_fit:
            return [rows]
        return [part for half in halve(rows, self._row_capacity()) for part in self._split(half)]

    def _lower_limit(self) -> None:
        """Lowers `tokens_that_fit` to what may fit on all ranks."""
        misfits = [size for size in from_every_rank(self._misfit, self._agreement.group) if size is not None]
        whole = [size for size in misfits if size.pairs < 2]
        self._errors.raise_if_any(whole[0].error() if whole and self._tried_again else None)
        self._tried_again = self._tried_again or bool(whole)
        self._needs_all = self._needs_all or bool(whole)
        halves = [size.tokens // 2 for size in misfits if size.pairs > 1]
        self.tokens_that_fit = min([self.tokens_that_fit, *halves])
        if self._misfit is not None:
            what = "it is split in two" if self._misfit.pairs > 1 else "it is tried once more with what could be freed"
            text = f"A pass of {self._misfit.pairs} pairs ran out of memory ({self._misfit.reason}); {what}."
            events.warn(logger, "out_of_memory", text, pairs=self._misfit.pairs, tokens=self._misfit.tokens)
