"""The check that an engine which holds a copy of the weights samples with the weights that are trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from online_dpo.distributed.collectives import RankErrors, is_first_rank, max_over_ranks
from online_dpo.distributed.weights import gathered
from online_dpo.errors import OutOfSyncError
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.introspection import computing_dtype
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.modeling.precision import without_autocast
from online_dpo.modeling.quantization import describe
from online_dpo.modeling.tolerance import is_full_precision, quantized_tolerance, sync_tolerance
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.types import Group, Prompt

PROMPTS, COMPLETIONS, TOKENS = 2, 2, 16

logger = logging.getLogger(__name__)


class SyncCheck:
    """Compares an engine's log-probabilities with the trainer's after the first sync, and then at intervals.

    Args:
        every: steps between two checks; with 0, only the first sync is checked.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.device, self._every = device, every
        self._errors = RankErrors(device)
        self._last: int | None = None
        self._first_difference: float | None = None

    def due(self, step: int) -> bool:
        """Whether the sync before this step is to be checked."""
        return self._last is None or (self._every > 0 and step - self._last >= self._every)

    @torch.no_grad()
    def check(
        self, engine: Engine, model: nn.Module, prompts: Sequence[Prompt], params: SamplingParams, seed: int, step: int
    ) -> None:
        """Compares the two right after a sync, on a few short completions of these prompts. A collective operation.

        The tolerance is that of the coarser of the two dtypes (`sync_tolerance`); where the trainer's weights are
        quantised, what that changes (`quantized_tolerance`).

        Raises:
            OutOfSyncError: on every rank, if the two differ by more than rounding error on any.
        """
        key = RolloutKey(seed, step, Stream.SYNC_CHECK)
        short = replace(params, max_new_tokens=min(TOKENS, params.max_new_tokens))
        chosen = prompts[:PROMPTS]
        # sampled before the weights are gathered: vLLM in this process may have to wake beside them otherwise
        # without prompts too: an engine may need all ranks; and in the dtypes of an engine with weights of its own
        with without_autocast():
            groups = self._errors.run(lambda: engine.generate(chosen, COMPLETIONS, short, key))
        with gathered(model):
            difference = self._errors.run(lambda: _difference(model, groups) if groups else 0.0)
        trainer_dtype = computing_dtype(model)
        engine_dtype = engine.own_dtype or trainer_dtype
        rounding, kind = max(sync_tolerance(trainer_dtype), sync_tolerance(engine_dtype)), describe(model)
        allowed = quantized_tolerance(kind, rounding, self._first_difference)
        worst = float(max_over_ranks(torch.tensor(difference, device=self.device)))
        if not worst <= allowed:
            raise OutOfSyncError(
                f"After the weights of step {step} were sent to it, the sampler's log-probabilities differ from the "
                f"trainer's by {worst:.1e} nats a token, where {allowed:.1e} could be "
                f"{'rounding' if allowed == rounding else 'the quantisation'}. It may serve another "
                "model, another dtype or quantisation, or a stale cache. Restart it with the policy's own folder and "
                "dtype."
            )
        self._tell_first(worst, rounding, kind, trainer_dtype, engine_dtype)
        self._last = step

    def _tell_first(
        self,
        worst: float,
        rounding: float,
        kind: str | None,
        trainer_dtype: torch.dtype,
        engine_dtype: torch.dtype,
    ) -> None:
        """Says, after the first check, if sampler and trainer compute differently and how much that changes."""
        if self._first_difference is not None:
            return
        self._first_difference = worst or None  # 0 without prompts
        if worst > rounding and is_first_rank():
            logger.warning(
                "The trainer's base model is quantised (%s) and the sampler's is not, or in another way: "
                "log-probabilities differ by %.1e nats a token, where rounding gives up to %.1e, and completions are "
                "not quite the policy's own.",
                kind,
                worst,
                rounding,
            )
        coarser = is_full_precision(trainer_dtype) and rounding > sync_tolerance(trainer_dtype)
        if worst <= rounding and coarser and is_first_rank():
            logger.warning(
                "The sampler computes in %s, the trainer in %s: log-probabilities differ by %.1e nats a token, and "
                "completions are not quite the policy's own. Start vLLM with `--dtype float32`, or train with `bf16`.",
                *(str(dtype).removeprefix("torch.") for dtype in (engine_dtype, trainer_dtype)),
                worst,
            )


def _difference(model: nn.Module, groups: Sequence[Group]) -> float:
    """Mean absolute difference of log-probabilities on this rank, in nats per token."""
    with eval_mode(model):
        rows = pack_groups(groups, [], shared=False).to(next(model.parameters()).device)
        trainer_logps_M = row_logprobs(model, rows, entropy=False, chunked=False).token_logps_M
    return float((trainer_logps_M - rows.sampled_logps_M).abs().mean())
