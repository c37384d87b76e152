"""`ObjectiveStep`: pairs to packed rows, rows to log-probabilities of policy and reference, and these to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import max_over_ranks, sum_over_ranks
from online_dpo.distributed.weights import forward_only, gathered
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign
from online_dpo.methods.base import Method
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.forward_path import ModelContext, PathChoice
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.precision import without_autocast
from online_dpo.modeling.reference import Reference
from online_dpo.objective.beta import Beta
from online_dpo.objective.inputs import LossOptions, PairLogprobs, pair_logprobs
from online_dpo.packing.microbatches import passes_needed, split_pairs, token_count
from online_dpo.packing.pack import as_inputs, by_group, pack_groups, pack_pairs, stand_in
from online_dpo.training.metrics.loss import STEP_KL, record_loss, trained_kl
from online_dpo.training.pass_size import PassSize
from online_dpo.training.run_context import RunContext
from online_dpo.types import Group, PackedRows, Pair, RowLogprobs


@dataclass(frozen=True)
class PairLosses:
    """The loss of some rows, and what it was computed from.

    ``loss`` is a scalar, with gradient; ``loss_N`` has the loss of each pair; ``policy`` and ``reference`` are the
    log-probabilities, ``reference`` is ``None`` for losses without one; ``beta`` is the one that was used.
    """

    loss: torch.Tensor
    loss_N: torch.Tensor
    policy: RowLogprobs
    reference: RowLogprobs | None
    beta: float

    def outputs(self) -> dict[str, Any]:
        """Returns the tensors but for the loss itself, by name."""
        return {"loss_N": self.loss_N, "policy": self.policy, "reference": self.reference}


class ObjectiveStep:
    """Computes the loss of an optimizer step, pass by pass.

    Args:
        args: the run's configuration.
        method: what is minimised on the pairs.
        reference: lends the reference model.
        beta: beta as it is now.
        run: the run around it.
        size: the most tokens of a pass.
    """

    def __init__(
        self,
        args: OnlineDPOConfig,
        method: Method,
        reference: Reference,
        beta: Beta,
        run: RunContext,
        size: PassSize,
    ) -> None:
        self.args, self.method, self.reference, self.beta, self.run = args, method, reference, beta, run
        self.size = size
        self.options = LossOptions.from_config(args)
        self.choice = PathChoice(run.accelerator.device, args.share_prompts, bool(args.flex_attention))

    def pack(self, model: nn.Module, pairs: list[Pair], num_batches: int) -> list[dict[str, Any]]:
        """Packs pairs into exactly as many micro-batches as were fetched, each with the rows of its passes.

        `transformers.Trainer` counts micro-batches to find the optimizer step; an empty one gets a stand-in of weight
        0. All ranks get equally many passes, because passes are collective operations.
        """
        self.settle_path(model, [members[0].group for members in by_group(pairs)])
        shared, parts = self.choice.path.shared, split_pairs(pairs, num_batches)
        if self.size.is_open:
            fullest = max(parts, key=token_count)
            self.size.settle(model, pack_pairs(fullest, shared) if fullest else stand_in(shared))
        capacity = self.size.row_capacity
        needed = torch.tensor(
            [passes_needed(part, self.size.tokens) for part in parts], device=self.run.accelerator.device
        )
        packed = [
            [pack_pairs(piece, shared, capacity) if piece else stand_in(shared) for piece in split_pairs(part, count)]
            for part, count in zip(parts, max_over_ranks(needed).tolist(), strict=True)
        ]
        return [as_inputs(rows) for rows in packed]

    def pack_for_evaluation(self, model: nn.Module, groups: Sequence[Group], pairs: Sequence[Pair]) -> dict[str, Any]:
        """Packs all completions of the groups, so that metrics cover those without a pair as well."""
        if self.run.accelerator.num_processes == 1:  # otherwise a step of training finds out, on all ranks together
            self.settle_path(model, groups)
        return {"rows": pack_groups(groups, pairs, self.choice.path.shared, self.size.row_capacity)}

    def settle_path(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Finds out once, on the first groups, which fast ways to log-probabilities are right for the models."""
        if self.choice.settled:
            return
        models: dict[str, ModelContext] = {"the policy": lambda: eval_mode(model)}
        if not self.args.reference_free:
            models["the reference"] = self.reference.active
        with gathered(model, *self.reference.models), self.run.accelerator.autocast():
            self.choice.settle(models, groups)
        self.size.fills_rows = self.choice.path.flex

    def totals(self, pairs: Sequence[Pair]) -> tuple[int, torch.Tensor]:
        """Returns the number of pairs of the step over all ranks, and the sum of their weights; 1 where there are none.

        A collective operation.
        """
        own = torch.tensor([float(len(pairs)), sum(pair.weight for pair in pairs)], device=self.run.accelerator.device)
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
        with self.run.phase("reference") if model.training else nullcontext():
            reference = self._reference_logprobs(rows)  # first: no activations of the policy are held meanwhile
        policy = row_logprobs(model, rows, chunked=self.choice.path.chunked)
        options = self._options_now()
        loss_N = self._losses_of(pair_logprobs(rows, policy, reference), options)
        total = (loss_N * rows.weight_N).sum()
        if num_items_in_batch is None:
            loss = total / _or_one(rows.weight_N.sum())
        else:
            loss = total / num_items_in_batch * self.run.accelerator.num_processes
        if model.training:
            self.run.work.trained(rows, reference is not None)
            record_loss(self.run.metrics, rows, policy, reference, loss_N, options.beta)
            if self.beta.adapts and reference is not None:
                self.run.metrics.mean(STEP_KL, trained_kl(rows, policy, reference))
        return PairLosses(loss, loss_N, policy, reference, options.beta)

    def _losses_of(self, pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
        """Returns the loss of each pair. Where it fails on one of several ranks, the others are in the same backward
        pass: this one takes part with a loss of 0, and the run ends before the update.
        """
        try:
            who = f"Loss `{self.args.loss_type}`"
            with without_autocast(), foreign(who, f"(step {self.run.step})", raises=ForeignCodeError):
                return self.method.losses(pairs, options)
        except ForeignCodeError as error:
            self.run.errors.defer(error)
            return pairs.chosen_N * 0

    @torch.no_grad()
    def _reference_logprobs(self, rows: PackedRows) -> RowLogprobs | None:
        if self.args.reference_free:
            return None
        with (
            self.run.accelerator.autocast(),
            self.reference.active() as reference,
            forward_only(reference),
            onednn_linears(reference, pack=False),
        ):
            return row_logprobs(reference, rows, entropy=False, chunked=self.choice.path.chunked)

    def _options_now(self) -> LossOptions:
        epoch = self.run.state().epoch or 0.0
        return self.options.now(self.beta.at(epoch), self.method.epoch_options(self.args, epoch))


def _or_one(total: torch.Tensor) -> torch.Tensor:
    return torch.where(total > 0, total, 1.0)
