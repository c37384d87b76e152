"""Gold: a scorer or judge that evaluations report and training never sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from online_dpo.config.feedback import HUMAN
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.evaluation.records import EvalRecord, GoldRecord, judged_wins, win_share
from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.judge_registry import build_judge, check_judge, registered_judge
from online_dpo.scoring.judges.human import check_patience
from online_dpo.scoring.judges.llm.judge import check_share
from online_dpo.scoring.notes import nothing_noted
from online_dpo.scoring.protocols import PairwiseScorer, PointwiseScorer
from online_dpo.scoring.registry import build_scorers, check_reward_path, check_scorers
from online_dpo.types import Group


class Gold:
    """Assesses the completions of an evaluation by scorers or a judge that training never sees.

    ``timeout`` is the number of seconds that one call of them may take. ``reward_weights``, ``reward_normalization``
    and the penalties are part of what is trained on, and have no effect here.
    """

    def __init__(
        self, scorers: Sequence[PointwiseScorer], judge: PairwiseScorer | None, timeout: float | None = None
    ) -> None:
        self.scorers = scorers
        self._assessor = Assessor(scorers, judge, lambda: AssessmentOptions(timeout=timeout))

    @property
    def sources(self) -> list[PointwiseScorer | PairwiseScorer]:
        """The scorers and the judge."""
        judge = self._assessor.judge
        return [*self.scorers, *([] if judge is None else [judge])]

    def assess(
        self, records: Sequence[EvalRecord], groups: Sequence[Group], reference_groups: Sequence[Group] | None
    ) -> list[EvalRecord]:
        """Returns the records with the gold scores and wins of their groups.

        Args:
            reference_groups: one completion of the reference for each prompt; without a reference ``None``, and there
                is no win rate.

        Raises:
            ScoringError: a scorer or the judge failed.
        """
        if self._assessor.judge is not None:
            assert reference_groups is not None
            wins = judged_wins(groups, reference_groups, self._assessor.preferences)
            gold = [GoldRecord((), win) for win in wins]
        else:
            gold = self._scored(groups, reference_groups)
        return [replace(record, gold=result) for record, result in zip(records, gold, strict=True)]

    def _scored(self, groups: Sequence[Group], reference_groups: Sequence[Group] | None) -> list[GoldRecord]:
        scores = self._assessor.scores(groups).values
        if reference_groups is None:
            return [GoldRecord(tuple(values), None) for values in scores]
        with nothing_noted():
            reference_scores = [values[0] for values in self._assessor.scores(reference_groups).values]
        return [
            GoldRecord(tuple(values), win_share(values, reference))
            for values, reference in zip(scores, reference_scores, strict=True)
        ]


def check_gold(reward_funcs: Any, judge: Any, args: OnlineDPOConfig) -> None:
    """Checks the gold rewards and the gold judge of an evaluation.

    Raises:
        ValueError, TypeError: gold is given twice, or cannot be used; raised before any model is loaded.
    """
    rewards = _gold_rewards(reward_funcs, args)
    if rewards is not None and judge is not None:
        raise ValueError("Give gold rewards (`eval_reward_funcs`, `eval_reward_model_path`) or `eval_judge`, not both.")
    if args.overoptimisation == "stop" and rewards is None and judge is None:
        raise ValueError(
            "`overoptimisation='stop'` compares the training score with a second one: give `eval_reward_funcs`, "
            "`eval_reward_model_path` or `eval_judge`."
        )
    if judge is not None and args.reference_free:
        raise ValueError("`eval_judge` compares with the reference, and with `reference_free` there is none.")
    if judge is not None:
        check_judge(judge, "eval_judge")
        check_share(registered_judge(judge), args.world_size)
        if judge == HUMAN:
            check_patience(args)
    if rewards is not None:
        check_scorers(rewards, None, _without_weights(args))


def build_gold(
    reward_funcs: Any,
    judge: Any,
    args: OnlineDPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    state: Callable[[], Any],
) -> Gold | None:
    """Returns what assesses evaluations, or ``None`` where neither rewards nor a judge are given."""
    if judge is not None:
        return Gold([], build_judge(judge, tokenizer, args), args.reward_timeout)
    rewards = _gold_rewards(reward_funcs, args)
    if rewards is None:
        return None
    scorers = build_scorers(rewards, None, _without_weights(args), state=state)
    return Gold(scorers, None, args.reward_timeout)


def _gold_rewards(reward_funcs: Any, args: OnlineDPOConfig) -> Any:
    """Returns the gold rewards, given as an argument or as a path in the configuration.

    Raises:
        ValueError: they are given in two places, and are not the same.
    """
    check_reward_path(reward_funcs, args.eval_reward_model_path, "eval_reward_model_path", "eval_reward_funcs")
    return reward_funcs if reward_funcs is not None else args.eval_reward_model_path


def _without_weights(args: OnlineDPOConfig) -> OnlineDPOConfig:
    """A copy without the weights and normalisation of the training rewards, of which there may be more or fewer."""
    plain = copy.copy(args)
    plain.reward_weights, plain.reward_normalization = None, "none"
    return plain
