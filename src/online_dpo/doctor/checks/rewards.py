"""What the rewards give to real completions: constant, missing, not finite, or nothing but their length."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import StatisticsError, correlation, fmean
from typing import Any

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check
from online_dpo.errors import one_line
from online_dpo.scoring.penalties import NO_PENALTIES
from online_dpo.scoring.protocols import PointwiseScorer
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.time_limit import time_limit
from online_dpo.types import Group

MUCH_LENGTH, ONLY_LENGTH = 0.8, 0.98
"""Correlations of a score with the length of its completion, within a group."""
FEW = 0.1
"""Share of scores that may be no number."""
PROBED = 4
"""Groups whose completions are replaced by other texts, to see whether a constant reward ever changes."""


@dataclass(frozen=True)
class Scored:
    """The scores of one scorer, flat, beside the lengths of the completions and the numbers of their groups."""

    scorer: PointwiseScorer
    values: list[float | None]
    lengths: list[int]
    groups: list[int]
    seconds: float

    @property
    def finite(self) -> list[int]:
        """The indices of scores that are numbers."""
        return [i for i, value in enumerate(self.values) if value is not None and math.isfinite(value)]


@check("rewards", loads_models=True)
def rewards(case: Case) -> Iterator[Finding]:
    """Scores the sampled completions with each reward."""
    groups, scorers = case.sampled.groups, case.trainer.scorers
    if not scorers:
        yield ok("there is no reward: a judge compares")
    for scorer in scorers:
        scored = score(case, scorer, groups)
        case.scoring_seconds += scored.seconds
        bad = [*_missing(scored), *_constant(case, scored, groups), *_length(scored)]
        yield from bad
        if not bad:
            yield _fine(scored)
    yield from _of_evaluations(case, groups)


def _of_evaluations(case: Case, groups: Sequence[Group]) -> Iterator[Finding]:
    """Scores the samples with the rewards of evaluations alone, of which nothing is trained."""
    for scorer in [] if case.trainer.gold is None else case.trainer.gold.scorers:
        bad = list(_missing(scored := score(case, scorer, groups), "Evaluations report nothing of such a completion."))
        yield from bad
        if not bad:
            yield _fine(scored, ", in evaluations")


def score(case: Case, scorer: PointwiseScorer, groups: Sequence[Group]) -> Scored:
    """Returns the scores that one scorer gives, with the time limit of the run."""
    timeout = case.trainer.args.reward_timeout
    raw: list[Any] = []  # NaN as it is: what is made of it is None
    began = time.perf_counter()
    with time_limit(timeout):
        score_groups(groups, [scorer], None, NO_PENALTIES, "none", lambda _, scores: raw.extend(scores))
    seconds = time.perf_counter() - began
    return Scored(
        scorer,
        [None if value is None else float(value) for row in raw for value in row],
        [len(one.token_ids) for group in groups for one in group.completions],
        [number for number, group in enumerate(groups) for _ in group.completions],
        seconds,
    )


def _missing(scored: Scored, effect: str = "Such a completion takes part in no pair.") -> Iterator[Finding]:
    name, count = scored.scorer.name, len(scored.values)
    none = sum(value is None for value in scored.values)
    wrong = count - none - len(scored.finite)
    if wrong:
        text = f"`{name}` gave {wrong} of {count} completions a score that is NaN or infinite"
        change = f"{effect} Find out in the reward where it divides by 0, or fails."
        yield (problem if wrong > FEW * count else warning)(text, change)
    if none:
        text = f"`{name}` gave {none} of {count} completions no score (None)"
        change = f"{effect} Return a number wherever the reward applies."
        yield (problem if none == count else warning)(text, change)


def _constant(case: Case, scored: Scored, groups: Sequence[Group]) -> Iterator[Finding]:
    name, finite = scored.scorer.name, scored.finite
    if len(finite) < 2:
        return
    values: list[Any] = scored.values
    by_group: dict[int, set[float]] = {}
    for i in finite:
        by_group.setdefault(scored.groups[i], set()).add(values[i])
    if any(len(found) > 1 for found in by_group.values()):
        return
    distinct = {values[i] for i in finite}
    if len(distinct) > 1:
        yield problem(
            f"`{name}` gives all completions of one prompt the same score, so that there is no pair",
            "The reward reads the prompt alone, it seems. Let it read `completions`.",
        )
        return
    others = _scores_of_other_texts(case, scored.scorer, groups)
    if distinct | others == distinct:
        yield problem(
            f"`{name}` is constant: {values[finite[0]]:g} for all {len(finite)} completions, and for other texts",
            "Let it tell answers apart: from equal scores no pair is formed.",
        )
    else:
        text = f"`{name}` gave {values[finite[0]]:g} to all {len(finite)} completions, and other scores to other texts"
        yield ok(f"{text} (up to {max(others):g}): the policy has to earn one by chance first")


def _scores_of_other_texts(case: Case, scorer: PointwiseScorer, groups: Sequence[Group]) -> set[float]:
    """Scores for an empty text and for the texts in the rows of the prompts, such as answers of the dataset."""
    made = []
    for group in groups[:PROBED]:
        texts = ["", "Yes.", *(value for value in group.prompt.columns.values() if isinstance(value, str))]
        end = case.tokenizer.eos_token_id
        completions = []
        for text in texts:
            ids = (*case.tokenizer(text, add_special_tokens=False)["input_ids"], *(() if end is None else (end,)))
            given = replace(group.completions[0], token_ids=tuple(ids), text=text, finish_reason="stop")
            completions.append(replace(given, logprobs=(0.0,) * len(ids)))
        made.append(Group(group.prompt, tuple(completions)))
    values = score(case, scorer, made).values
    return {value for value in values if value is not None and math.isfinite(value)}


def _length(scored: Scored) -> Iterator[Finding]:
    together = length_correlation(scored)
    if together is None or abs(together) < MUCH_LENGTH:
        return
    longer = "longer" if together > 0 else "shorter"
    text = f"`{scored.scorer.name}` goes with the length of a completion: correlation {together:+.2f} within a prompt"
    change = (
        f"The policy would learn to write {longer} answers. Divide by the length, set `length_penalty` or "
        "`reward_weights`, or take another reward, unless length is what you want."
    )
    yield (problem if abs(together) >= ONLY_LENGTH else warning)(text, change, correlation=together)


def length_correlation(scored: Scored) -> float | None:
    """Returns the correlation of scores and lengths, each less its group's mean; ``None`` where one does not vary."""
    finite = scored.finite
    values: list[Any] = scored.values
    members: dict[int, list[int]] = {}
    for i in finite:
        members.setdefault(scored.groups[i], []).append(i)
    xs, ys = [], []
    for indices in members.values():
        mean_x, mean_y = fmean(scored.lengths[i] for i in indices), fmean(values[i] for i in indices)
        xs += [scored.lengths[i] - mean_x for i in indices]
        ys += [values[i] - mean_y for i in indices]
    if len(xs) < 8:
        return None
    try:
        return correlation(xs, ys)
    except StatisticsError:
        return None


def _fine(scored: Scored, where: str = "") -> Finding:
    values: list[Any] = [scored.values[i] for i in scored.finite]
    together = length_correlation(scored)
    said = "" if together is None else f", correlation with length {together:+.2f}"
    text = f"`{one_line(scored.scorer.name, 60)}` gives {min(values):.3g} to {max(values):.3g}{said}{where}"
    return ok(text, lowest=min(values), highest=max(values), correlation=together, seconds=scored.seconds)
