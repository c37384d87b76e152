"""The check that an engine which holds a copy of the weights samples with the weights that are trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from online_dpo.distributed.collectives import is_first_rank, max_over_ranks
from online_dpo.errors import OutOfSyncError
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.introspection import computing_dtype
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.modeling.tolerance import is_full_precision, sync_tolerance
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.types import Prompt

PROMPTS, COMPLETIONS, TOKENS = 2, 2, 16

logger = logging.getLogger(__name__)


class SyncCheck:
    """Compares an engine's log-probabilities with the trainer's after the first sync, and then at intervals.

    Args:
        every: steps between two checks; with 0, only the first sync is checked.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.device, self._every = device, every
        self._last: int | None = None

    def due(self, step: int) -> bool:
        """Whether the sync before this step is to be checked."""
        return self._last is None or (self._every > 0 and step - self._last >= self._every)

    @torch.no_grad()
    def check(
        self, engine: Engine, model: nn.Module, prompts: Sequence[Prompt], params: SamplingParams, seed: int, step: int
    ) -> None:
        """Compares the two right after a sync, on a few short completions of these prompts. A collective operation.

        The tolerance is that of the coarser of the two dtypes (`sync_tolerance`).

        Raises:
            OutOfSyncError: on every rank, if the two differ by more than rounding error on any.
        """
        key = RolloutKey(seed, step, Stream.SYNC_CHECK)
        difference = self._difference(engine, model, prompts[:PROMPTS], params, key)
        trainer_dtype = computing_dtype(model)
        engine_dtype = engine.own_dtype or trainer_dtype
        allowed = max(sync_tolerance(trainer_dtype), sync_tolerance(engine_dtype))
        worst = float(max_over_ranks(torch.tensor(difference, device=self.device)))
        if not worst <= allowed:
            raise OutOfSyncError(
                f"After the weights of step {step} were sent to it, the sampler's log-probabilities differ from the "
                f"trainer's by {worst:.1e} nats a token, where {allowed:.1e} could be rounding. It may serve another "
                "model, another dtype or quantisation, or a stale cache. Restart it with the policy's own folder and "
                "dtype."
            )
        coarser = is_full_precision(trainer_dtype) and allowed > sync_tolerance(trainer_dtype)
        if self._last is None and coarser and is_first_rank():
            logger.warning(
                "The sampler computes in %s, the trainer in %s: log-probabilities differ by %.1e nats a token, and "
                "completions are not quite the policy's own. Start vLLM with `--dtype float32`, or train with `bf16`.",
                *(str(dtype).removeprefix("torch.") for dtype in (engine_dtype, trainer_dtype)),
                worst,
            )
        self._last = step

    def _difference(
        self, engine: Engine, model: nn.Module, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey
    ) -> float:
        """Mean absolute difference of log-probabilities on this rank, in nats per token; 0 without prompts."""
        if not prompts:
            return 0.0
        short = replace(params, max_new_tokens=min(TOKENS, params.max_new_tokens))
        groups = engine.generate(prompts, COMPLETIONS, short, key)
        with eval_mode(model):
            rows = pack_groups(groups, [], shared=False).to(next(model.parameters()).device)
            trainer_logps_M = row_logprobs(model, rows, entropy=False, chunked=False).token_logps_M
        return float((trainer_logps_M - rows.sampled_logps_M).abs().mean())
