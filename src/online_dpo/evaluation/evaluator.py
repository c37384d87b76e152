"""`Evaluator`: samples answers to held-out prompts, assesses them, compares them with the reference's, records them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from online_dpo.distributed.collectives import any_rank
from online_dpo.distributed.device_memory import Kept
from online_dpo.distributed.sampling import whole_on
from online_dpo.distributed.weights import gathered
from online_dpo.evaluation.gold import Gold
from online_dpo.evaluation.records import EvalRecord, eval_records, judged_wins, win_share
from online_dpo.modeling.memory import Halving
from online_dpo.modeling.reference import Reference
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.params import RolloutKey, Stream
from online_dpo.rollout.sampler import Sampler
from online_dpo.scoring.assess import Assessor
from online_dpo.scoring.notes import nothing_noted
from online_dpo.types import Completion, Group, PackedRows, Pair, Pairing, Prompt, Scores, Verdicts

FormPairs = Callable[[Sequence[Group], Scores | Verdicts, int], Pairing]
"""Groups and their assessment to pairs; the number is the optimizer step, which seeds random choices."""

Losses = Callable[[nn.Module, Sequence[Group], Sequence[Pair]], tuple[PackedRows, dict[str, Any]]]
"""The rows of all groups, and `compute_loss`'s outputs for them: ``loss_N``, ``policy`` and ``reference``."""


class ReferenceAnswers:
    """One completion of each prompt by the reference as it was before training, sampled once and kept.

    Args:
        reference: lends the model with the weights of the start.
        engine: samples from that model.
        sampler: how the policy's completions are sampled; the reference's are sampled in the same way.
    """

    def __init__(self, reference: Reference, engine: Engine, sampler: Sampler) -> None:
        self._reference, self.engine, self._sampler = reference, engine, sampler
        self._device = sampler.sync_check.device
        self._kept: dict[tuple[int, tuple[int, ...]], tuple[Completion, ...]] = {}
        self._memory = Kept(engine.release)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Samples the completions of these prompts that are not kept yet. A collective operation."""
        new = [prompt for prompt in prompts if (prompt.row, prompt.token_ids) not in self._kept]
        if any_rank(bool(new), self._device):
            key = RolloutKey(self._sampler.seed, 0, Stream.REFERENCE)
            with self._memory.in_use(), self._reference.at_start(), self._sampler.autocast():
                for group in self.engine.generate(new, 1, self._sampler.params, key):
                    self._kept[group.prompt.row, group.prompt.token_ids] = group.completions

    def to(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Returns a group with one completion for each prompt. What `prepare` has not sampled is sampled now: then all
        ranks must call this.
        """
        if any((prompt.row, prompt.token_ids) not in self._kept for prompt in prompts):
            self.prepare(prompts)
        return [Group(prompt, self._kept[prompt.row, prompt.token_ids]) for prompt in prompts]


class Evaluator:
    """Evaluates the policy on batches of held-out prompts, always with the same random numbers.

    So two evaluations differ by the weights alone.

    Args:
        num_completions: returns how many completions each prompt gets; a callback may change the configuration.
        sampler: samples them.
        assessor: the one that training uses.
        form_pairs: forms pairs as training does.
        losses: computes the losses of these pairs.
        reference_answers: the completions that the policy's are compared with; ``None`` without a reference.
        gold: a second assessment that training never sees.
        reference_models: the reference's own, which is gathered if it is sharded.
    """

    def __init__(
        self,
        num_completions: Callable[[], int],
        sampler: Sampler,
        assessor: Assessor,
        form_pairs: FormPairs,
        losses: Losses,
        reference_answers: ReferenceAnswers | None,
        gold: Gold | None,
        reference_models: Sequence[nn.Module] = (),
    ) -> None:
        self._num_completions = num_completions
        self._sampler, self._assessor, self._form_pairs, self._losses = sampler, assessor, form_pairs, losses
        self.reference_answers, self.gold = reference_answers, gold
        self._reference_models = reference_models
        self._fitting = Halving("An evaluation")

    def sample(self, prompts: Sequence[Prompt], sync: Callable[[Sequence[Prompt]], None]) -> list[Group]:
        """Returns the policy's completions. A collective operation, after which the reference has answered too.

        Args:
            prompts: usable ones.
            sync: hands the policy's weights to the engine.

        Raises:
            UnknownTokenError: a prompt or completion has a token that a model does not know.
        """
        self._sampler.vocabulary.check_prompts(prompts)
        sync(prompts)
        if self.reference_answers is not None:
            self.reference_answers.prepare(prompts)
        key = RolloutKey(self._sampler.seed, 0, Stream.EVALUATION)  # without prompts too: others may need this rank
        groups = self._sampler.sample(prompts, self._num_completions(), key)
        self._sampler.vocabulary.check_groups(groups)
        return groups

    @torch.no_grad()
    def evaluate(self, model: nn.Module, groups: Sequence[Group]) -> list[EvalRecord]:
        """Returns one record for each prompt. A collective operation: what is sharded is gathered, now that an engine
        with its own weights has sampled and needs its memory no more.

        Args:
            model: the policy, ready for a forward pass and in eval mode.
            groups: what `sample` has returned.

        Raises:
            ScoringError: a scorer or the judge failed.
            WholeModelDoesNotFit: on every rank, if the policy does not fit on any.
        """
        with (
            whole_on(self._sampler.sync_check.device, model),
            gathered(*self._reference_models, *self._assessor.models),
        ):
            return self._evaluate(model, groups) if groups else []

    def _evaluate(self, model: nn.Module, groups: Sequence[Group]) -> list[EvalRecord]:
        assessment = self._assessor.assess(groups)
        pairs = self._form_pairs(groups, assessment, 0).pairs
        reference_scores, wins = self._against_reference(groups, assessment)
        scores = assessment.scores if isinstance(assessment, Verdicts) else assessment

        def records_of(places: Sequence[int]) -> list[EvalRecord]:
            chosen = [groups[p] for p in places]
            own = [pair for pair in pairs if any(pair.group is group for group in chosen)]
            rows, outputs = self._losses(model, chosen, own)
            values = None if scores is None else [scores.values[p] for p in places]
            against = [reference_scores[p] for p in places], [wins[p] for p in places]
            return eval_records(chosen, own, values, *against, rows, **outputs)

        records = self._fitting(range(len(groups)), records_of)
        if self.gold is None:
            return records
        reference_groups = (
            None if self.reference_answers is None else self.reference_answers.to([group.prompt for group in groups])
        )
        return self.gold.assess(records, groups, reference_groups)

    def _against_reference(
        self, groups: Sequence[Group], assessment: Scores | Verdicts
    ) -> tuple[Sequence[float | None], Sequence[float | None]]:
        """Returns for each group the score of the reference's completion, and the policy's share of wins against it, by
        the judge if there is one.
        """
        nothing = [None] * len(groups)
        if self.reference_answers is None:
            return nothing, nothing
        reference_groups = self.reference_answers.to([group.prompt for group in groups])
        scores: Sequence[float | None] = nothing
        if self._assessor.scorers:
            with nothing_noted():
                scores = [values[0] for values in self._assessor.scores(reference_groups).values]
        if isinstance(assessment, Scores):
            return scores, [win_share(own, other) for own, other in zip(assessment.values, scores, strict=True)]
        return scores, judged_wins(groups, reference_groups, self._assessor.preferences)
