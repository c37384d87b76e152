"""`ObjectiveStep`: pairs to packed rows, rows to log-probabilities of policy and reference, and these to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerState

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import max_over_ranks, sum_over_ranks
from online_dpo.methods.base import Method
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.forward_path import ModelContext, PathChoice
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.reference import Reference
from online_dpo.objective.beta import Beta
from online_dpo.objective.inputs import LossOptions, pair_logprobs
from online_dpo.packing.microbatches import passes_needed, split_pairs
from online_dpo.packing.pack import as_inputs, by_group, pack_groups, pack_pairs, stand_in
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics import STEP_KL, record_loss, trained_kl
from online_dpo.training.stopwatch import PhaseTimer
from online_dpo.types import Group, PackedRows, Pair, RowLogprobs


@dataclass(frozen=True)
class PairLosses:
    """The loss of some rows, and what it was computed from.

    ``loss`` is a scalar, with gradient; ``loss_N`` has the loss of each pair; ``policy`` and ``reference`` are the
    log-probabilities, ``reference`` is ``None`` for losses without one.
    """

    loss: torch.Tensor
    loss_N: torch.Tensor
    policy: RowLogprobs
    reference: RowLogprobs | None

    def outputs(self) -> dict[str, Any]:
        """Returns all but the loss itself, by name."""
        return {"loss_N": self.loss_N, "policy": self.policy, "reference": self.reference}


class ObjectiveStep:
    """Computes the loss of an optimizer step, pass by pass.

    Args:
        args: the run's configuration.
        method: what is minimised on the pairs.
        reference: lends the reference model.
        beta: beta as it is now.
        accelerator: mixed precision and ranks.
        metrics: where what the passes gave is recorded.
        phase: measures seconds.
        state: returns the trainer's state.
    """

    def __init__(
        self,
        args: OnlineDPOConfig,
        method: Method,
        reference: Reference,
        beta: Beta,
        accelerator: Accelerator,
        metrics: MetricStore,
        phase: PhaseTimer,
        state: Callable[[], TrainerState],
    ) -> None:
        self.args, self.method, self.reference, self.beta = args, method, reference, beta
        self.accelerator, self.metrics, self.phase, self._state = accelerator, metrics, phase, state
        self.options = LossOptions.from_config(args)
        self.choice = PathChoice(accelerator.device, args.share_prompts)

    def pack(self, model: nn.Module, pairs: list[Pair], num_batches: int) -> list[dict[str, Any]]:
        """Packs pairs into exactly as many micro-batches as were fetched, each with the rows of its passes.

        `transformers.Trainer` counts micro-batches to find the optimizer step; an empty one gets a stand-in of weight
        0. All ranks get equally many passes, because passes are collective operations.
        """
        self.settle_path(model, [members[0].group for members in by_group(pairs)])
        shared, capacity = self.choice.path.shared, self.args.row_capacity
        parts = split_pairs(pairs, num_batches)
        needed = torch.tensor(
            [passes_needed(part, self.args.tokens_per_pass) for part in parts], device=self.accelerator.device
        )
        packed = [
            [pack_pairs(piece, shared, capacity) if piece else stand_in(shared) for piece in split_pairs(part, count)]
            for part, count in zip(parts, max_over_ranks(needed).tolist(), strict=True)
        ]
        return [as_inputs(rows) for rows in packed]

    def pack_for_evaluation(self, model: nn.Module, groups: Sequence[Group], pairs: Sequence[Pair]) -> dict[str, Any]:
        """Packs all completions of the groups, so that metrics cover those without a pair as well."""
        if self.accelerator.num_processes == 1:  # otherwise a step of training finds out, on all ranks together
            self.settle_path(model, groups)
        return {"rows": pack_groups(groups, pairs, self.choice.path.shared, self.args.row_capacity)}

    def settle_path(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Finds out once, on the first groups, which fast ways to log-probabilities are right for the models."""
        models: dict[str, ModelContext] = {"the policy": lambda: eval_mode(model)}
        if not self.args.reference_free:
            models["the reference"] = self.reference.active
        with self.accelerator.autocast():
            self.choice.settle(models, groups)

    def totals(self, pairs: Sequence[Pair]) -> tuple[int, torch.Tensor]:
        """Returns the number of pairs of the step over all ranks, and the sum of their weights; 1 where there are none.

        A collective operation.
        """
        own = torch.tensor([float(len(pairs)), sum(pair.weight for pair in pairs)], device=self.accelerator.device)
        count, weight = sum_over_ranks(own)
        return int(count), _or_one(weight)

    def losses(
        self, model: nn.Module, rows: PackedRows, num_items_in_batch: torch.Tensor | int | None = None
    ) -> PairLosses:
        """Returns the loss of some rows.

        It is the sum of the pairs' losses over the number of pairs in the whole step (their mean by weight, if they
        have weights), over all ranks and micro-batches; times the number of ranks, because data parallelism averages
        gradients over them.

        Args:
            rows: on the device of the models.
            num_items_in_batch: the sum of weights from `totals`; when not given, that of these rows.
        """
        with self.phase("reference") if model.training else nullcontext():
            reference = self._reference_logprobs(rows)  # first: no activations of the policy are held meanwhile
        policy = row_logprobs(model, rows, chunked=self.choice.path.chunked)
        options = self._options_now()
        loss_N = self.method.losses(pair_logprobs(rows, policy, reference), options)
        total = (loss_N * rows.weight_N).sum()
        if num_items_in_batch is None:
            loss = total / _or_one(rows.weight_N.sum())
        else:
            loss = total / num_items_in_batch * self.accelerator.num_processes
        if model.training:
            record_loss(self.metrics, rows, policy, reference, loss_N, options.beta)
            if self.beta.adapts and reference is not None:
                self.metrics.mean(STEP_KL, trained_kl(rows, policy, reference))
        return PairLosses(loss, loss_N, policy, reference)

    @torch.no_grad()
    def _reference_logprobs(self, rows: PackedRows) -> RowLogprobs | None:
        if self.args.reference_free:
            return None
        with self.accelerator.autocast(), self.reference.active() as reference, onednn_linears(reference, pack=False):
            return row_logprobs(reference, rows, entropy=False, chunked=self.choice.path.chunked)

    def _options_now(self) -> LossOptions:
        epoch = self._state().epoch or 0.0
        return self.options.now(self.beta.at(epoch), self.method.epoch_options(self.args, epoch))


def _or_one(total: torch.Tensor) -> torch.Tensor:
    return torch.where(total > 0, total, 1.0)
