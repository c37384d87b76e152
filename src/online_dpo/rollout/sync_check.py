"""Does an engine with weights of its own sample from the weights that are trained?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from online_dpo.distributed.collectives import is_first_rank, max_over_ranks
from online_dpo.errors import OutOfSyncError
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.introspection import computing_dtype
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.modeling.tolerance import MOST_ROUNDING, ROUNDING
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.types import Prompt

PROMPTS, COMPLETIONS, TOKENS = 2, 2, 16
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Difference in nats a token. Other types: what rounding makes between two right ways to compute it
(`models.ROUNDING`). Of an engine's type and the trainer's, the coarser one decides.
"""

logger = logging.getLogger(__name__)


class SyncCheck:
    """Compares an engine's log-probabilities with the trainer's after the first sync, and every so many steps.

    Args:
        every: steps between two checks; 0 checks the first sync only.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self._device, self._every = device, every
        self._last: int | None = None

    def due(self, step: int) -> bool:
        return self._last is None or (self._every > 0 and step - self._last >= self._every)

    @torch.no_grad()
    def check(
        self, engine: Engine, model: nn.Module, prompts: Sequence[Prompt], params: SamplingParams, seed: int, step: int
    ) -> None:
        """Right after a sync, on a few short completions of this step's prompts. A collective operation.

        Raises:
            OutOfSyncError: the two differ by more than rounding; on every rank.
        """
        short = replace(params, max_new_tokens=min(TOKENS, params.max_new_tokens))
        gap = 0.0
        if prompts:
            groups = engine.generate(prompts[:PROMPTS], COMPLETIONS, short, RolloutKey(seed, step, Stream.SYNC_CHECK))
            with eval_mode(model):
                rows = pack_groups(groups, [], shared=False).to(next(model.parameters()).device)
                found_M = row_logprobs(model, rows, entropy=False, chunked=False).token_logps_M
            gap = float((found_M - rows.sampled_logps_M).abs().mean())
        ours = computing_dtype(model)
        theirs = engine.own_dtype or ours
        allowed = max(ALLOWED.get(dtype, MOST_ROUNDING * ROUNDING[dtype]) for dtype in (ours, theirs))
        worst = float(max_over_ranks(torch.tensor(gap, device=self._device)))
        if not worst <= allowed:
            raise OutOfSyncError(
                f"After the weights of step {step} were given to it, the sampler's log-probabilities differ from the "
                f"trainer's by {worst:.1e} nats a token, where {allowed:.1e} could be rounding. It may serve another "
                "model, another dtype or quantisation, or a stale cache. Start it anew with the policy's own folder "
                "and dtype."
            )
        if self._last is None and allowed > ALLOWED.get(ours, math.inf) and is_first_rank():
            logger.warning(
                "The sampler computes in %s, the trainer in %s: log-probabilities differ by %.1e nats a token, and "
                "completions are not quite the policy's own. Start vLLM with `--dtype float32`, or train with `bf16`.",
                *(str(dtype).removeprefix("torch.") for dtype in (theirs, ours)),
                worst,
            )
        self._last = step
