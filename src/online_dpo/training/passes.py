"""Forward and backward passes of a micro-batch: split in two where memory runs out, and then made again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

from online_dpo.modeling.memory import DoesNotFit, in_memory
from online_dpo.packing.microbatches import halve, token_count
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.stopwatch import PhaseTimer
from online_dpo.types import PackedRows

logger = logging.getLogger(__name__)

Pass = Callable[[PackedRows], torch.Tensor]
"""One forward and backward pass; returns the loss, without gradient."""


class PassRunner:
    """Runs the passes of an optimizer step so that each fits in memory, with the same gradient in the end.

    A backward pass that ran out of memory leaves part of its gradient behind. So all gradients of the step are dropped
    and its passes are run again. From then on no pass has more than half of the tokens that did not fit, unless it is a
    single pair.

    Args:
        metrics: where passes record; what an abandoned pass has recorded is taken back.
        row_capacity: returns the tokens of a row when a pass is split.
        num_processes: with more than one, a pass cannot be split: other ranks wait in the same backward pass.
        drop_gradients: sets the gradients of the step to zero.
        free_memory: gives back memory of the device that can be had again.
    """

    def __init__(
        self,
        metrics: MetricStore,
        phase: PhaseTimer,
        row_capacity: Callable[[], int],
        num_processes: int,
        drop_gradients: Callable[[], None],
        free_memory: Callable[[], None],
    ) -> None:
        self._metrics, self._phase = metrics, phase
        self._row_capacity, self._num_processes = row_capacity, num_processes
        self._drop_gradients, self._free_memory = drop_gradients, free_memory
        self._done: list[PackedRows] = []
        self.tokens_that_fit = sys.maxsize

    def begin_step(self) -> None:
        """Forgets the passes of the step before."""
        self._done = []

    def run(self, rows: PackedRows, one_pass: Pass) -> torch.Tensor:
        """Runs one pass, or as many as fit in memory, and returns the sum of their losses.

        Raises:
            DoesNotFit: a single pair does not fit, or there are several processes.
        """
        if len(rows.pairs) > 1 and token_count(rows.pairs) > self.tokens_that_fit:
            return torch.stack([self.run(half, one_pass) for half in halve(rows, self._row_capacity())]).sum()
        before = self._metrics.snapshot()
        loss = torch.empty(())
        with self._phase("training"), in_memory() as attempt:
            loss = one_pass(rows)
        if not attempt.fits:
            self._metrics.restore(before)
            self._begin_step_anew(rows, one_pass)
            return self.run(rows, one_pass)
        self._done.append(rows)
        return loss

    def _begin_step_anew(self, rows: PackedRows, one_pass: Pass) -> None:
        refuse_to_split(rows, self._num_processes)
        self.tokens_that_fit = token_count(rows.pairs) // 2
        self._drop_gradients()
        self._free_memory()
        before = self._metrics.snapshot()
        for done in self._done:
            one_pass(done)
        self._metrics.restore(before)  # those were recorded the first time


def refuse_to_split(rows: PackedRows, num_processes: int) -> None:
    """Raises where a pass that ran out of memory cannot be split in two; warns that it is where it can.

    Raises:
        DoesNotFit: the pass is a single pair, or other ranks wait in the same backward pass.
    """
    pairs = len(rows.pairs)
    if pairs < 2 or num_processes > 1:
        raise DoesNotFit(
            f"A pass of {pairs} pair(s), in rows of {rows.tokens.ids_RT.shape[1]} tokens, does not fit in memory "
            "and cannot be split here. Lower `max_tokens_per_pass` (which splits micro-batches of several pairs), "
            "`max_length` or `max_new_tokens`."
        )
    logger.warning("A pass of %d pairs ran out of memory; it is split in two.", pairs)
