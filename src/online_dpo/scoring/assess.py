"""Assessment of groups: scores by scorers, preferences by a judge, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.weights import gathered
from online_dpo.scoring.accounting import ScoreFailures
from online_dpo.scoring.judges.top_k import judge_the_top
from online_dpo.scoring.judges.tournament import ComparisonCounter, find_preferences
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import CountingScorer, Counts, PairwiseScorer, PointwiseScorer, WaitingScorer
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.time_limit import time_limit
from online_dpo.types import Group, Scores, Verdicts


@dataclass(frozen=True)
class AssessmentOptions:
    """How scores are put together, and which completions a judge compares.

    ``weights`` are those of the scorers, 1 each by default; ``normalization`` is that of the scores within a group, as
    in `score_groups`; ``penalties`` are for the length of a completion and for a missing end; ``judge_top`` is the
    number of completions that the judge compares if there are scorers as well; ``timeout`` is the number of seconds
    that one call of a reward function, a reward model or a judge may take; ``max_failure_share`` is the share of a
    scorer's scores that may be NaN or infinite.

    >>> AssessmentOptions(weights=[1.0, 0.5], penalties=Penalties(missing_eos=1.0))
    """

    weights: Sequence[float] | None = None
    normalization: str | Sequence[str] = "none"
    penalties: Penalties = NO_PENALTIES
    judge_top: int = 0
    timeout: float | None = None
    max_failure_share: float = 1.0

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> AssessmentOptions:
        """Returns the options of a configuration."""
        return cls(
            args.reward_weights,
            args.reward_normalization,
            Penalties.from_config(args),
            args.judge_top or 0,
            args.reward_timeout,
            args.max_failure_share,
        )


class Assessor:
    """Assesses groups with scorers, with a judge, or with a judge that compares the completions of the highest scores.

    Args:
        scorers: pointwise scorers, whose weighted sum is the score.
        judge: compares two completions of a prompt.
        options: returns the options; called for each assessment, since callbacks may change a run's configuration.
        models: those of scorers that are sharded; they are whole during an assessment.
    """

    def __init__(
        self,
        scorers: Sequence[PointwiseScorer] = (),
        judge: PairwiseScorer | None = None,
        options: Callable[[], AssessmentOptions] = AssessmentOptions,
        models: Sequence[nn.Module] = (),
    ) -> None:
        self.scorers, self.judge, self._options, self.models = scorers, judge, options, models
        self._failures = ScoreFailures()

    def assess(self, groups: Sequence[Group]) -> Scores | Verdicts:
        """Return the scores of the groups, or the judge's preferences if there is a judge. A collective operation if
        models are sharded: a rank without groups calls it as well.

        Raises:
            ScoringError: a scorer or the judge failed.
        """
        with gathered(*self.models):
            return self._assess(groups)

    def _assess(self, groups: Sequence[Group]) -> Scores | Verdicts:
        options = self._options()
        self._begin()
        with time_limit(options.timeout):
            if self.judge is not None and not self.scorers:
                return find_preferences(groups, self.judge, options.penalties)
            scores = self.scores(groups)
            if self.judge is None:
                return scores
            return judge_the_top(groups, scores, self.judge, options.judge_top, options.penalties)

    def scores(self, groups: Sequence[Group]) -> Scores:
        """Return the scores without the judge, minus the penalties.

        Raises:
            ScoringError: a scorer failed.
        """
        if not groups:
            return Scores([], {})
        options = self._options()
        with time_limit(options.timeout):
            return score_groups(
                groups,
                self.scorers,
                options.weights,
                options.penalties,
                options.normalization,
                lambda scorer, scores: self._failures.add(scorer, scores, options.max_failure_share),
            )

    def preferences(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return the judge's probability that the first of two completions is better, minus the penalties.

        Args:
            comparisons: groups of two completions.

        Raises:
            ScoringError: the judge failed.
        """
        assert self.judge is not None
        options = self._options()
        self._begin()
        with time_limit(options.timeout):
            return ComparisonCounter(self.judge, options.penalties)(comparisons)

    def _begin(self) -> None:
        if isinstance(self.judge, WaitingScorer):
            self.judge.begin_assessment()

    def drain_counts(self) -> Counts:
        """Return the judge's counts since the last call, such as requests and failures, and reset them."""
        return self.judge.drain() if isinstance(self.judge, CountingScorer) else Counts({}, {})
