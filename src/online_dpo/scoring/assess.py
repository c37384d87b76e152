"""Assessment of groups: scores by scorers, preferences by a judge, or both."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.scoring.judges.top_k import judge_the_top
from online_dpo.scoring.judges.tournament import ComparisonCounter, find_preferences
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import CountingScorer, Counts, PairwiseScorer, PointwiseScorer
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.types import Group, Scores, Verdicts


class Assessor:
    """Assesses groups with scorers, with a judge, or with a judge that compares the completions of the highest scores.

    Args:
        scorers: pointwise scorers, whose weighted sum is the score.
        judge: compares two completions of a prompt.
        weights: weights of the scorers; 1 each by default.
        normalization: normalisation of the scores within a group, as in `score_groups`.
        penalties: penalties for the length of a completion and for a missing end.
        judge_top: number of completions that the judge compares if there are scorers as well.
    """

    def __init__(
        self,
        scorers: Sequence[PointwiseScorer] = (),
        judge: PairwiseScorer | None = None,
        *,
        weights: Sequence[float] | None = None,
        normalization: str | Sequence[str] = "none",
        penalties: Penalties = NO_PENALTIES,
        judge_top: int = 0,
    ) -> None:
        self.scorers, self.judge = list(scorers), judge
        self._weights, self._normalization = weights, normalization
        self.penalties, self._judge_top = penalties, judge_top

    @classmethod
    def from_config(
        cls, scorers: Sequence[PointwiseScorer], judge: PairwiseScorer | None, args: OnlineDPOConfig
    ) -> Assessor:
        """Build an assessor with the weights, normalisation and penalties of a configuration."""
        return cls(
            scorers,
            judge,
            weights=args.reward_weights,
            normalization=args.reward_normalization,
            penalties=Penalties.from_config(args),
            judge_top=args.judge_top or 0,
        )

    def assess(self, groups: Sequence[Group]) -> Scores | Verdicts:
        """Return the scores of the groups, or the judge's preferences if there is a judge.

        Raises:
            ScoringError: a scorer or the judge failed.
        """
        if self.judge is not None and not self.scorers:
            return find_preferences(groups, self.judge, self.penalties)
        scores = self.scores(groups)
        if self.judge is None:
            return scores
        return judge_the_top(groups, scores, self.judge, self._judge_top, self.penalties)

    def scores(self, groups: Sequence[Group]) -> Scores:
        """Return the scores without the judge, minus the penalties.

        Raises:
            ScoringError: a scorer failed.
        """
        if not groups:
            return Scores([], {})
        return score_groups(groups, self.scorers, self._weights, self.penalties, self._normalization)

    def preferences(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return the judge's probability that the first of two completions is better, minus the penalties.

        Args:
            comparisons: groups of two completions.

        Raises:
            ScoringError: the judge failed.
        """
        assert self.judge is not None
        return ComparisonCounter(self.judge, self.penalties)(comparisons)

    def drain_counts(self) -> Counts:
        """Return the judge's counts since the last call, such as requests and failures, and reset them."""
        return self.judge.drain() if isinstance(self.judge, CountingScorer) else Counts({}, {})
