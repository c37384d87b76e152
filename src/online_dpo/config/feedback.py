"""Fields of the configuration that say how completions are scored and which of them become pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from online_dpo.config.checking import check_numbers
from online_dpo.config.field_specs import documented

RewardNormalization = Literal["none", "group"]
HUMAN = "human"  # how run files and the trainer name people as judge
PairSelection = Literal["best_worst", "best_random", "best_mean_minus_two_sigma", "all_pairs", "widest_allowed"]


@documented
@dataclass
class FeedbackFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- scoring ----------------------------------------------------------------------------------------------------

    reward_model_path: str | None = None
    """Folder or hub name of a sequence-classification reward model. In a run file it is added to `reward_funcs`."""

    reward_weights: list[float] | None = None
    """Weight of each reward function, in their order; when not set, each counts 1."""

    reward_normalization: RewardNormalization | list[RewardNormalization] = "none"
    """How the scores of reward functions are rescaled before they are weighted and added up: `none`, or `group`, the
    distance from the mean of the prompt's completions in standard deviations. A list has one entry for each of them.
    It decides which completions become pairs and with what margin; logged scores, evaluations and win rates stay as
    they are.
    """

    reward_model_sharding: Literal["replicate", "shard"] = "replicate"
    """Whether each process holds whole reward models, or a part of them where the policy's weights are in parts (FSDP2,
    ZeRO-3): for models that are large beside the policy. Parts are gathered once for each scoring call.
    """

    reward_batch_size: int = 16
    """Texts in one forward pass of a reward model."""

    reward_timeout: float | None = None
    """Seconds that one call of a reward function, a reward model or a judge of your own may take; then the run ends
    with a checkpoint. Such a call is made in another thread. When not set: any time, and a notice tells after a minute
    who is waited for. Language models as judges, people and rewards over HTTP have time limits of their own.
    """

    human_timeout: float = 3600.0
    """With `judge: human`, seconds that a step waits for people's votes, which they give in `online-dpo dashboard`.
    What is not voted on by then has no answer.
    """

    missing_eos_penalty: float | None = None
    """Subtracted from the score of a completion that did not end by itself, or, with a judge, from its log-odds against
    one that did; above 0.
    """

    length_penalty: float | None = None
    """Subtracted from the score of a completion for each of its tokens, or, with a judge, from its log-odds for each
    token that it is longer than the other; above 0.
    """

    judge_top: int | None = None
    """With both a reward and a judge: the judge compares only this many completions of a prompt, those with the highest
    scores; the best of them is chosen, the lowest score rejected. At least 2. When not set, a judge is not used beside
    a reward.
    """

    max_failure_share: float = 0.2
    """Largest share of the latest 200 scores of a reward, or answers of a judge, that may be NaN or infinite, from the
    20th on; above it the run saves a checkpoint and stops. In [0, 1]; 1 never stops. `None` is no failure: a reward
    does not apply, a judge has no answer. `judge: llm` and rewards over HTTP have a setting of this name of their own.
    """

    # --- pairs ------------------------------------------------------------------------------------------------------

    pair_selection: PairSelection = "best_worst"
    """Which completions of a group become pairs. `best_worst`: the highest against the lowest score. `best_random`:
    the highest against a random lower one. `best_mean_minus_two_sigma`: the highest against the one closest to the
    group's mean minus two standard deviations (arXiv 2502.16825). `all_pairs`: each against each lower one.
    `widest_allowed`: of all pairs that `min_margin`, `max_margin` and `max_length_ratio` allow, the one whose scores
    differ most. A judge goes with `best_worst`.
    """

    min_margin: float | None = None
    """Leave out pairs whose scores differ by less; above 0."""

    max_margin: float | None = None
    """Leave out pairs whose scores differ by more; above 0."""

    max_length_ratio: float | None = None
    """Leave out pairs in which one completion has more than this many times the tokens of the other; 1 or more."""

    margin_weighting: bool = False
    """Pairs count in proportion to the difference of their scores. Off: all count the same."""

    label_temperature: float | None = None
    """Makes labels soft: a pair's probability becomes the sigmoid of its scores' difference divided by this
    (Bradley-Terry); above 0. When not set, the higher score is certainly the better one. A judge brings probabilities
    of its own.
    """

    tie_policy: Literal["skip", "first"] = "skip"
    """When the best and the worst score are equal: `skip` drops the group and counts it, `first` trains the first
    completion as the chosen one (what TRL does)."""

    resample_rounds: int = 0
    """How often the prompts whose completions give no pair (ties, missing scores, the same tokens, excluded margins)
    are answered and scored anew within their step, before they are dropped. All completions of such a prompt are
    replaced. With `max_staleness` it needs a vLLM server.
    """

    # --- gold ---------------------------------------------------------------------------------------------------------

    eval_reward_model_path: str | None = None
    """Folder or hub name of a gold reward model: evaluations report its score as `eval_gold_score`, and training never
    sees it. In a run file it is added to `eval_reward_funcs`."""

    overoptimisation: Literal["off", "warn", "stop"] = "warn"
    """What to do when an evaluation shows that the training score has risen and the gold score has fallen since the
    evaluation with the best gold score, both by more than two standard errors (arXiv 2210.10760): `off`, `warn`, or
    `stop` after a checkpoint. Nothing happens without a gold scorer."""

    overoptimisation_patience: int = 1
    """Evaluations in a row that have to show it."""


def check_feedback(args: FeedbackFields, num_completions: int) -> None:
    """Check how completions are scored and how pairs are formed.

    Raises:
        ValueError: a number is out of range, or two options contradict each other.
    """
    low, high, longest = args.min_margin, args.max_margin, args.max_length_ratio
    temperature, top = args.label_temperature, args.judge_top
    unfinished, token = args.missing_eos_penalty, args.length_penalty
    checks = [
        (args.reward_batch_size >= 1, "reward_batch_size", "at least 1"),
        (0 <= args.max_failure_share <= 1, "max_failure_share", "in [0, 1]"),
        (args.reward_timeout is None or 0 < args.reward_timeout < math.inf, "reward_timeout", "above 0"),
        (0 < args.human_timeout < math.inf, "human_timeout", "above 0"),
        (unfinished is None or 0 < unfinished < math.inf, "missing_eos_penalty", "above 0"),
        (token is None or 0 < token < math.inf, "length_penalty", "above 0"),
        (top is None or 2 <= top <= num_completions, "judge_top", f"from 2 to {num_completions} completions"),
        (low is None or 0 < low < math.inf, "min_margin", "above 0"),
        (high is None or 0 < high < math.inf, "max_margin", "above 0"),
        (longest is None or longest >= 1, "max_length_ratio", "1 or more"),
        (temperature is None or 0 < temperature < math.inf, "label_temperature", "above 0"),
        (args.resample_rounds >= 0, "resample_rounds", "0 or more"),
        (args.overoptimisation_patience >= 1, "overoptimisation_patience", "at least 1"),
    ]
    check_numbers(args, checks)
    if low is not None and high is not None and low > high:
        raise ValueError(f"`min_margin` ({low}) is above `max_margin` ({high}): no pair would be left.")
    if args.tie_policy == "first":
        for name in ("min_margin", "margin_weighting", "label_temperature"):
            if getattr(args, name):
                raise ValueError(f"`tie_policy='first'` trains pairs without a margin, which `{name}` needs.")
