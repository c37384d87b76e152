"""A `Trainer` that has its prompts answered and the answers scored: fetch, sample and score, with a look ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from online_dpo.data.collate import prompts_from_batch
from online_dpo.data.cut import CUT
from online_dpo.errors import ForeignCodeError
from online_dpo.evaluation.gold import Gold, build_gold
from online_dpo.evaluation.overoptimization import OveroptimisationGuard
from online_dpo.evaluation.records import EvalRecord, judged_wins, win_share
from online_dpo.foreign import foreign
from online_dpo.modeling.known_tokens import VocabularyCheck
from online_dpo.modeling.reference import Reference
from online_dpo.objective.beta import Beta
from online_dpo.pairing.rounds import without_pair
from online_dpo.pairing.select import Selection, pairs_from_preferences, pairs_from_scores, pairs_of_two
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.lookahead import Fetched, Lookahead
from online_dpo.rollout.opponent import Opponent, joined
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.rollout.sync_check import SyncCheck
from online_dpo.scoring.judges.top_k import judge_the_top
from online_dpo.scoring.judges.tournament import ComparisonCounter, find_preferences
from online_dpo.scoring.notes import nothing_noted, noting
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.protocols import CountingScorer, PairwiseScorer, PointwiseScorer
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.training.arguments import check_templates
from online_dpo.training.hf_trainer import GuardedTrainer
from online_dpo.training.metrics import record_notes, record_rollout
from online_dpo.training.stopwatch import Stopwatch
from online_dpo.types import Completion, Feedback, Group, Pairing, Prompt, Round, Scores, Verdicts


class FeedbackTrainer(GuardedTrainer):
    """Prompts to groups, their scores or preferences, and pairs; `OnlineDPOTrainer` learns from them.

    The attributes below are set by its constructor. ``reference_engine`` samples from the reference.
    """

    args: Any
    tokenizer: PreTrainedTokenizerBase
    policy: nn.Module
    reference: Reference
    readers: VocabularyCheck
    engine: Engine
    reference_engine: TransformersEngine
    opponent: Opponent
    adaptive_beta: Beta
    sampling: SamplingParams
    selection: Selection
    judge: PairwiseScorer | None
    scorers: list[PointwiseScorer]
    gold: Gold | None
    lookahead: Lookahead
    sync_check: SyncCheck
    nobody_samples: Event
    reference_completions: dict[tuple[int, tuple[int, ...]], tuple[Completion, ...]]
    last_feedback: Feedback | None = None
    """That of the step which is trained on, on this process."""

    def _take(self, batches: Iterator[Any], num_batches: int) -> tuple[Fetched, Feedback, float]:
        """The prompts of this step, what became of them, and the seconds that this had to be waited for.

        What fails outside of the trainer (a server, a reward function, a judge, a dataset) ends the run on every rank.

        Raises:
            OnlineDPOError: as it was raised.
            FeedbackLostError: on the other ranks.
        """
        self.raise_on_every_rank(self.callback_handler.failure)
        return self.together(
            lambda: self.lookahead.take(
                self.state.global_step,
                batches,
                lambda step: self._fetch(step, batches, num_batches),
                self._sample_and_score,
            )
        )

    def _fetch(self, step: int, batches: Iterator[Any], num_batches: int) -> Fetched | None:
        """The prompts of a step; ``None`` for a later step that there will not be."""
        later = step > self.state.global_step
        if later:
            num_batches = self.args.gradient_accumulation_steps if step < self.state.max_steps else 0
        with foreign("Reading the training prompts", raises=ForeignCodeError):
            fetched = list(islice(batches, num_batches))
        if later and not fetched:
            return None
        prompts = [prompt for batch in self.without_fill(fetched) for prompt in prompts_from_batch(batch)]
        usable = [prompt for prompt in prompts if prompt.invalid is None]
        self.readers.check_prompts(usable)  # of a stream, or of a collator, nothing is known before
        return Fetched(usable, len(prompts), len(fetched))

    def _sample_and_score(self, step: int, prompts: list[Prompt]) -> Callable[[], Feedback]:
        """Samples with the present weights, and returns what may run beside training: scoring, and sampling as well if
        the engine has a device of its own. The policy's opponent, if it has one, answers at once.
        """
        self.nobody_samples.wait()
        if self.args.resample_rounds:
            with self.phase("waiting"):  # steps begun before may sample until they are scored, with the weights of then
                self.lookahead.wait()
        self._sync_engine(prompts)
        with Stopwatch(self.accelerator.device) as before, self.accelerator.autocast():
            theirs = self.opponent.answer(prompts, self.sampling, RolloutKey(self.args.seed, step, Stream.OPPONENT))

        self.nobody_samples = done = Event()

        def sample() -> tuple[list[Group], float]:
            try:
                groups, seconds = self._answer(theirs, step)
            finally:
                done.set()
            return groups, before.seconds + seconds

        sampled = None if self.engine.overlaps else sample()

        def score() -> Feedback:
            groups, seconds = sampled or sample()
            with Stopwatch(self.accelerator.device) as watch, noting() as notes:
                assessment = self._assess(groups)
            first = Feedback(groups, assessment, {"rollout": seconds, "scoring": watch.seconds}, notes=notes)
            return self._answer_again(first, theirs, step)

        return score

    def _answer(self, theirs: Sequence[Group], step: int, number: int = 0) -> tuple[list[Group], float]:
        """The policy's answers beside those of its opponent, and the seconds that they took; each round has others."""
        own = self.args.num_completions - self.opponent.completions
        key = RolloutKey(self.args.seed, step, Stream.TRAINING, first_sample=number * own)
        with Stopwatch(self.accelerator.device) as watch, self.accelerator.autocast():
            groups = self.engine.generate([group.prompt for group in theirs], own, self.sampling, key)
        answered = joined(groups, theirs)
        self.readers.check_groups(answered)
        return answered, watch.seconds

    def _answer_again(self, first: Feedback, theirs: Sequence[Group], step: int) -> Feedback:
        """Up to ``resample_rounds`` times, the prompts whose group gives no pair; what an opponent said stays."""
        groups, assessment, places = first.groups, first.said, list(range(len(first.groups)))
        seconds, further = {**first.seconds}, first.further
        for number in range(1, self.args.resample_rounds + 1):
            places = [places[i] for i in without_pair(groups, self._form_pairs(groups, assessment, step))]
            if not places and self.accelerator.num_processes == 1:
                break
            groups, sampling = self._answer([theirs[p] for p in places], step, number)  # on every rank equally often
            with Stopwatch(self.accelerator.device) as watch:
                assessment = self._assess(groups)
            seconds = {"rollout": seconds["rollout"] + sampling, "scoring": seconds["scoring"] + watch.seconds}
            if places:
                further += (Round(places, groups, assessment),)
        return replace(first, seconds=seconds, further=further)

    def _sync_engine(self, prompts: Sequence[Prompt]) -> None:
        step = self.state.global_step
        with self.phase("sync"), self.accelerator.autocast():
            # weights that an optimizer evaluates are none of those that a step samples from
            self.engine.sync(self.policy, -1 - step if self.holds_evaluation_weights else step)
            if self.engine.has_own_weights and self.sync_check.due(step):
                self.sync_check.check(self.engine, self.policy, prompts, self.sampling, self.args.seed, step)

    def _record(self, fetched: Fetched, feedback: Feedback, waited: float) -> None:
        self.metrics.total("prompts", fetched.num_prompts)
        self.metrics.total("dropped/invalid_prompt", fetched.num_prompts - len(fetched.prompts))
        self.metrics.total(CUT, sum(prompt.cut for prompt in fetched.prompts))
        for name, seconds in {**feedback.seconds, "waiting": waited}.items():
            self.metrics.total(f"time/{name}", seconds / self.accelerator.num_processes)
        record_rollout(self.metrics, feedback.groups, feedback.said, self.state.global_step)
        record_notes(self.metrics, feedback.notes)
        self.last_feedback = feedback
        judge = self.judge
        if isinstance(judge, CountingScorer):
            counts = judge.drain()
            for name, amount in counts.sums.items():
                self.metrics.total(name, amount)
            for name, (part, whole) in counts.rates.items():
                self.metrics.ratio(name, part, whole)

    def _assess(self, groups: list[Group]) -> Scores | Verdicts:
        """What the scorers, or the judge, or both say of the groups."""
        if self.judge is not None and not self.scorers:
            return find_preferences(groups, self.judge, self._penalties)
        scores = self._scores_of(groups) if groups else Scores([], {})
        if self.judge is None:
            return scores
        return judge_the_top(groups, scores, self.judge, self.args.judge_top, self._penalties)

    def _scores_of(self, groups: list[Group]) -> Scores:
        args = self.args
        return score_groups(groups, self.scorers, args.reward_weights, self._penalties, args.reward_normalization)

    @property
    def _penalties(self) -> Penalties:
        return Penalties.from_config(self.args)

    def _against_reference(
        self, groups: list[Group], assessment: Scores | Verdicts
    ) -> tuple[Sequence[float | None], Sequence[float | None]]:
        """For each group the score of the reference's completion, and the policy's share of wins against it, by the
        judge if there is one.
        """
        nothing = [None] * len(groups)
        if self.args.reference_free:
            return nothing, nothing
        rivals = self._rivals([group.prompt for group in groups])
        with nothing_noted():
            scores = [values[0] for values in self._scores_of(rivals).values] if self.scorers else nothing
        if isinstance(assessment, Scores):
            return scores, [win_share(mine, theirs) for mine, theirs in zip(assessment.values, scores, strict=True)]
        assert self.judge is not None
        return scores, judged_wins(groups, rivals, ComparisonCounter(self.judge, self._penalties))

    def _form_pairs(self, groups: list[Group], assessment: Scores | Verdicts, step: int) -> Pairing:
        if self.args.method == "nash_md":
            return pairs_of_two(groups, assessment, self.args.label_temperature or 1.0)
        if isinstance(assessment, Verdicts):
            return pairs_from_preferences(groups, assessment.preferences, self.selection, assessment.scores)
        key = RolloutKey(self.args.seed, step, Stream.PAIRING)

        def draw(prompt: Prompt) -> float:
            return float(uniform_numbers(key, prompt.row, sample=0, count=1)[0])

        return pairs_from_scores(groups, assessment, self.selection, draw)

    def _rivals(self, prompts: list[Prompt]) -> list[Group]:
        """One completion for each prompt of the reference as it was before training; sampled once."""
        new = [prompt for prompt in prompts if (prompt.row, prompt.token_ids) not in self.reference_completions]
        if new:
            key = RolloutKey(self.args.seed, 0, Stream.REFERENCE)
            with self.reference.at_start(), self.accelerator.autocast():
                for group in self.reference_engine.generate(new, 1, self.sampling, key):
                    self.reference_completions[group.prompt.row, group.prompt.token_ids] = group.completions
        return [Group(prompt, self.reference_completions[prompt.row, prompt.token_ids]) for prompt in prompts]

    def free_memory(self) -> None:
        """The parent's, and what engines keep between calls."""
        self.engine.release()
        self.opponent.release()
        if not self.args.reference_free:
            self.reference_engine.release()
        super().free_memory()

    def watch_gold(self, reward_funcs: Any, judge: Any) -> None:
        """Have evaluations report what these say, and compared with the training score as the configuration says."""
        self.gold = build_gold(reward_funcs, judge, self.args, self.tokenizer, state=lambda: self.state)
        if self.gold is not None:
            check_templates(self.gold.scorers, self.train_dataset)
        if self.gold is not None and self.args.overoptimisation != "off":
            stop = self.args.overoptimisation == "stop"
            self.add_callback(OveroptimisationGuard(stop, self.args.overoptimisation_patience))

    def _with_gold(self, records: list[EvalRecord], groups: list[Group]) -> list[EvalRecord]:
        if self.gold is None:
            return records
        rivals = None if self.args.reference_free else self._rivals([group.prompt for group in groups])
        return self.gold.assess(records, groups, rivals)

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """As the parent's, once nothing else asks the engine and the scorers."""
        self.lookahead.wait()
        with super().beside_training():
            yield

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.lookahead.save(folder, self.accelerator.process_index, self.state.global_step)
        if self.is_world_process_zero():
            self.reference.save(folder)
            self.adaptive_beta.save(folder)
            self.guard.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.lookahead.restore(Path(checkpoint), self.accelerator.process_index)
            self.reference.restore(Path(checkpoint))
            self.adaptive_beta.restore(Path(checkpoint))
            self.guard.restore(Path(checkpoint), self.state.global_step)
