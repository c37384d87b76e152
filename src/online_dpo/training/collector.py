"""`FeedbackCollector`: the prompts of an optimizer step to completions, their assessment, and pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import prompts_from_batch
from online_dpo.data.cut import CUT
from online_dpo.distributed.collectives import from_every_rank
from online_dpo.distributed.device_memory import Kept
from online_dpo.errors import ForeignCodeError
from online_dpo.evaluation.evaluator import FormPairs
from online_dpo.foreign import foreign
from online_dpo.pairing.rounds import latest, reasons
from online_dpo.rollout.begun import Fetched, SampledRound, Samples
from online_dpo.rollout.lookahead import Lookahead
from online_dpo.rollout.opponent import Opponent, joined
from online_dpo.rollout.params import RolloutKey, Stream
from online_dpo.rollout.sampler import Sampler
from online_dpo.runs import events
from online_dpo.scoring.assess import Assessor
from online_dpo.scoring.notes import noting
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_registry import METRICS, record_registered
from online_dpo.training.metrics.agreement import record_agreement_with_labels
from online_dpo.training.metrics.pairs import record_pairs, record_resampling
from online_dpo.training.metrics.rollout import record_counts, record_notes, record_rollout
from online_dpo.training.run_context import RunContext
from online_dpo.types import Feedback, Group, Pairing, Prompt, Round, Scores, Verdicts

Batches = Iterator[dict[str, list[Any]]]

describe(
    "Prompts",
    Metric("prompts", "prompts", "prompts read, over all ranks", "Equals `pairs/groups` plus all of `dropped/*`."),
    Metric(CUT, "prompts", "prompts that were longer than they may be", "Raise `max_length` if there are many."),
)


class FeedbackCollector:
    """Collects what a step learns from: fetches prompts, has them answered and the answers assessed, and forms pairs.

    With ``max_staleness`` the next steps are begun before this one is trained on. What was begun is part of a
    checkpoint.

    Args:
        args: the run's configuration.
        sampler: samples the policy's completions.
        opponent: adds completions of another model to each group.
        assessor: scores or judges the groups.
        form_pairs: groups and their assessment to pairs.
        run: the run around it.
    """

    def __init__(
        self,
        args: OnlineDPOConfig,
        sampler: Sampler,
        opponent: Opponent,
        assessor: Assessor,
        form_pairs: FormPairs,
        run: RunContext,
    ) -> None:
        self.args, self.sampler, self.opponent, self.assessor = args, sampler, opponent, assessor
        self._opponent_memory = Kept(opponent.release)
        self.form_pairs, self.run = form_pairs, run
        self.lookahead = Lookahead(args.max_staleness)
        self._sampler_is_free = Event()
        self._sampler_is_free.set()
        self._has_restored = (
            args.max_staleness > 0
        )  # some ranks may have, with another number than wrote the checkpoint
        self.last: Feedback | None = None
        """The feedback of the step that is trained on, on this process."""

    def collect(self, batches: Batches, num_batches: int) -> tuple[Pairing, int]:
        """Returns the pairs of this step, and the number of batches that it fetched.

        What fails outside of the trainer (a server, a reward function, a judge, a dataset) ends the run on every rank.
        A collective operation.

        Raises:
            OnlineDPOError: as it was raised.
            FeedbackLostError: on the other ranks.
        """
        if self._has_restored:
            self._agree_on_restored()
        fetched, feedback, waited = self.run.errors.run(
            lambda: self.lookahead.take(
                self.run.step, batches, lambda step: self._fetch_all(step, batches, num_batches), self.sample_and_assess
            )
        )
        if feedback.pairing is None:
            feedback = self._paired(feedback, self.run.step)
        assert feedback.pairing is not None
        self.last = feedback
        self._record(fetched, feedback, waited)
        if len(METRICS):
            pairing, step = feedback.pairing, self.run.step
            self.run.errors.run(lambda: record_registered(self.run.metrics, feedback, pairing, step))
        return feedback.pairing, fetched.num_batches

    def _fetch_all(self, step: int, batches: Batches, num_batches: int) -> Fetched | None:
        """As `_fetch`; ends all ranks where one fails or has other numbers, before they sample together."""
        fetched = self.run.errors.run(lambda: self._fetch(step, batches, num_batches))
        own = 0 if fetched is None else fetched.num_batches
        self.run.errors.check_same({"batches": own}, f"data for step {step + 1}")
        return fetched

    def _fetch(self, step: int, batches: Batches, num_batches: int) -> Fetched | None:
        """Returns the prompts of a step; ``None`` for a later step that there will not be."""
        state = self.run.state()
        later = step > state.global_step
        if later:
            num_batches = self.args.gradient_accumulation_steps if step < state.max_steps else 0
        with foreign("Reading the training prompts", raises=ForeignCodeError):
            fetched = list(islice(batches, num_batches))
        self.run.prompts_read()
        if later and not fetched:
            return None
        prompts = [prompt for batch in self.without_fill(fetched) for prompt in prompts_from_batch(batch)]
        usable = [prompt for prompt in prompts if prompt.invalid is None]
        self.sampler.vocabulary.check_prompts(usable)  # of a stream, or of a collator, nothing is known before
        return Fetched(usable, len(prompts), len(fetched))

    def without_fill(self, batches: list[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
        """Returns the batches of a step without the rows that a data loader repeats so that all ranks have equally
        many.

        In the last batch of an epoch, rank r holds the places from r times the batch size on; places beyond the end of
        the dataset hold rows of its beginning, which have been trained on.
        """
        loader = self.run.accelerator.gradient_state
        if (
            self.run.accelerator.num_processes == 1
            or not batches
            or not loader.end_of_dataloader
            or loader.remainder <= 0
        ):
            return batches
        first_place = self.run.accelerator.process_index * self.args.per_device_train_batch_size
        own = max(0, loader.remainder - first_place)
        return [*batches[:-1], {name: values[:own] for name, values in batches[-1].items()}]

    def sample_and_assess(
        self, step: int, prompts: list[Prompt], samples: Samples | None = None
    ) -> tuple[Samples, Callable[[], Feedback]]:
        """Samples with the present weights, and returns what may run beside training.

        That is the assessment, and sampling as well if the engine has a device of its own. The policy's opponent
        answers at once: it may be a model that is trained. ``samples`` are those of a checkpoint; they are only
        assessed.
        """
        if samples is not None:
            self.sampler.vocabulary.check_groups([group for one in samples.rounds for group in one.groups])
            return samples, partial(self._assess, samples, step)
        self._sampler_is_free.wait()
        if self.args.resample_rounds:
            with self.run.phase("waiting"):
                self.lookahead.wait()  # steps begun before may sample again until they are paired, with older weights
        with self.run.phase.stopwatch() as watch, self.sampler.autocast():
            key = RolloutKey(self.args.seed, step, Stream.OPPONENT)
            with self._opponent_memory.in_use():
                opponent_groups = self.opponent.answer(prompts, self.sampler.params, key)
        self.sync(prompts)  # wakes an engine in this process, which then needs the memory
        samples = Samples(opponent_groups, watch.seconds)
        self._sampler_is_free = done = Event()

        def sample() -> None:
            try:
                self._sample_round(samples, 0, list(range(len(prompts))), step)
            finally:
                done.set()

        if not self.sampler.engine.overlaps:
            sample()

        def answer() -> Feedback:
            if not samples.rounds:
                sample()
            return self._assess(samples, step)

        return samples, answer

    def _assess(self, samples: Samples, step: int) -> Feedback:
        """Assesses what was sampled, has prompts without a pair answered again, and forms pairs."""
        first = samples.rounds[0]
        with self.run.phase.stopwatch() as watch, noting() as notes:
            assessment = self._assessed(first.groups)
        seconds = {"rollout": samples.opponent_seconds + first.seconds, "scoring": watch.seconds}
        feedback = Feedback(first.groups, assessment, seconds, notes=notes)
        return self._paired(self._answered_again(feedback, samples, step), step)

    def _assessed(self, groups: Sequence[Group]) -> Scores | Verdicts:
        if self.assessor.models:  # they are gathered, for which no rank may be missing that could not sample
            self.run.errors.raise_if_any()
        return self.assessor.assess(groups)

    def sync(self, prompts: Sequence[Prompt]) -> None:
        """Hands the policy's weights to the engine; a collective operation."""
        self.run.errors.raise_if_any()  # what failed on one rank before would leave the others waiting in here
        step = self.run.step
        with self.run.phase("sync"):
            # weights that an optimizer evaluates are none of those that a step samples from
            self.sampler.sync(prompts, step, -1 - step if self.run.holds_evaluation_weights() else step)

    def _sample_round(self, samples: Samples, number: int, places: list[int], step: int) -> SampledRound:
        """Returns the policy's completions of the prompts at some places, joined with its opponent's.

        Each round (``number``) draws other completions. One that was sampled before is not sampled again.
        """
        if number < len(samples.rounds) and samples.rounds[number].places == places:
            return samples.rounds[number]
        del samples.rounds[number:]
        opponent_groups = [samples.opponent[place] for place in places]
        own = self.args.num_completions - self.opponent.completions
        key = RolloutKey(self.args.seed, step, Stream.TRAINING, first_sample=number * own)
        with self.run.phase.stopwatch() as watch:
            groups = self.sampler.sample([group.prompt for group in opponent_groups], own, key)
        groups = joined(groups, opponent_groups)
        self.sampler.vocabulary.check_groups(groups)
        samples.rounds.append(SampledRound(places, groups, watch.seconds))
        return samples.rounds[number]

    def _answered_again(self, first: Feedback, samples: Samples, step: int) -> Feedback:
        """Has prompts without a pair answered again, up to ``resample_rounds`` times; the opponent's answers stay."""
        groups, assessment, places = first.groups, first.said, list(range(len(first.groups)))
        seconds, further = {**first.seconds}, first.further
        for number in range(1, self.args.resample_rounds + 1):
            why = reasons(groups, self.form_pairs(groups, assessment, step))
            places = [place for place, reason in zip(places, why, strict=True) if reason is not None]
            if not places and self.run.accelerator.num_processes == 1:
                break
            again = self._sample_round(samples, number, places, step)  # on every rank equally often
            groups = again.groups
            with self.run.phase.stopwatch() as watch, noting() as notes:
                assessment = self._assessed(groups)
            seconds = {"rollout": seconds["rollout"] + again.seconds, "scoring": seconds["scoring"] + watch.seconds}
            if places:
                lacked = [reason for reason in why if reason is not None]
                further += (Round(places, groups, assessment, lacked, notes),)
        return replace(first, seconds=seconds, further=further)

    def _paired(self, feedback: Feedback, step: int) -> Feedback:
        groups, assessment = latest(feedback)
        return replace(feedback, pairing=self.form_pairs(groups, assessment, step))

    def _record(self, fetched: Fetched, feedback: Feedback, waited: float) -> None:
        assert feedback.pairing is not None
        metrics = self.run.metrics
        metrics.total("prompts", fetched.num_prompts)
        metrics.total("dropped/invalid_prompt", fetched.num_prompts - len(fetched.prompts))
        metrics.total(CUT, sum(prompt.cut for prompt in fetched.prompts))
        for name, seconds in {**feedback.seconds, "waiting": waited}.items():
            self.run.phase.add(name, seconds)
        record_rollout(metrics, feedback.groups, feedback.said, self.run.step)
        record_notes(metrics, feedback.notes)
        record_counts(metrics, self.assessor.drain_counts())
        record_pairs(metrics, len(feedback.groups), feedback.pairing)
        groups, said = latest(feedback)
        scores = said.scores if isinstance(said, Verdicts) else said
        if scores is not None:
            record_agreement_with_labels(metrics, groups, scores, feedback.pairing.pairs)
        self.run.work.sampled(feedback, here=not self.sampler.engine.overlaps)
        if self.args.resample_rounds:
            record_resampling(metrics, feedback.further, feedback.pairing)
        if feedback.further:
            asked, left = len(feedback.further[0].places), feedback.pairing.dropped.total()
            text = f"{asked} prompts without a pair were answered again; {left} still have none."
            events.emit("resample", text, groups=asked, rescued=asked - left)

    def files(self, rank: int) -> Sequence[str]:
        """Returns the name of the file of the steps that have been begun ahead of training."""
        return self.lookahead.files(rank)

    def save(self, folder: Path, rank: int) -> None:
        """Writes the steps that have been begun ahead of training."""
        self.lookahead.save(folder, rank, self.run.step)

    def restore(self, folder: Path, rank: int) -> None:
        """Takes the steps that `save` wrote for those that have been begun."""
        self.lookahead.restore(folder, rank)
        self._has_restored = True

    def _agree_on_restored(self) -> None:
        """Forgets restored steps that only some ranks have saved, since all must begin such a step together; and all of
        them if the run differs from the one that sampled them. A collective operation.
        """
        self._has_restored = False
        steps = set.intersection(*from_every_rank(self.lookahead.restored))
        self.lookahead.keep_restored(() if self.run.differs() else steps)

    def wait(self) -> None:
        """Waits until nothing that was begun asks the engine or the scorers any more."""
        self.lookahead.wait()
