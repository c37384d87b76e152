"""What the stages know of the run around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from transformers import TrainerState

from online_dpo.distributed.collectives import RankErrors
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.work import Work
from online_dpo.training.stopwatch import PhaseTimer


@dataclass(frozen=True)
class RunContext:
    """The parts of a trainer that its stages share.

    ``accelerator`` knows ranks, device and mixed precision; ``errors`` ends the run on all ranks where one fails;
    ``metrics`` records, ``phase`` measures seconds and ``work`` counts tokens and operations. ``state`` returns the
    trainer's state, which is another object after a checkpoint has been loaded. ``holds_evaluation_weights`` says
    whether the policy has the weights that its optimizer evaluates, where these are others than it trains.
    ``prompts_read`` is called when prompts have been read, before anything else is done with them. ``differs`` says
    whether the checkpoint that was resumed is of a run that computed with something else.
    """

    accelerator: Accelerator
    errors: RankErrors
    metrics: MetricStore
    phase: PhaseTimer
    work: Work
    state: Callable[[], TrainerState]
    holds_evaluation_weights: Callable[[], bool]
    prompts_read: Callable[[], None] = lambda: None
    differs: Callable[[], bool] = lambda: False

    @property
    def step(self) -> int:
        """The number of optimizer steps that are done."""
        return self.state().global_step
