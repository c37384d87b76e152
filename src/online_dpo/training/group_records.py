"""Joins what the stages said of each group of a step to one record a group. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from online_dpo.pairing.rounds import latest, reasons
from online_dpo.runs.records import ComparisonRecord, CompletionRecord, GroupRecord, OrderRecord, PairRecord
from online_dpo.training.trained_pairs import TrainedCompletion, TrainedPair
from online_dpo.types import Comparison, Completion, Feedback, Group, Notes, Pair, Question, Scores, Verdicts

RESAMPLED = "resampled"
"""Why a group has no pair whose prompt was answered again."""

Pieces = Callable[[Sequence[int]], list[str]]
"""Token ids to the text of each token."""


@dataclass(frozen=True)
class StepTrained:
    """What became of a step on a rank: its number, its feedback, what was said of each pair by the pair's `id`, and
    whether its update was left out.
    """

    step: int
    rank: int
    feedback: Feedback
    pairs: Mapping[int, TrainedPair]
    skipped: bool = False


def group_records(of: StepTrained, pieces: Pieces, places: Collection[int] | None = None) -> list[GroupRecord]:
    """The records of the groups at some places (all of them, if not given), by place and round.

    Args:
        pieces: cuts the completions that were trained on into the texts of their tokens.
    """
    answers = sorted(_answers(of.feedback), key=lambda answer: (answer.place, answer.round))
    return [_record(of, answer, pieces) for answer in answers if places is None or answer.place in places]


@dataclass(frozen=True)
class _Answer:
    """A group of one round, and what was said of it: ``said`` and ``notes`` are those of all groups of its round, in
    which it has the number ``p``.
    """

    place: int
    round: int
    p: int
    group: Group
    said: Scores | Verdicts
    notes: Mapping[str, Sequence[Any]]
    pairs: tuple[Pair, ...] = ()
    reason: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    resampled_for: str | None = None


def _answers(feedback: Feedback) -> Iterator[_Answer]:
    """All groups of a step, those of all rounds."""
    places: Sequence[int] = range(len(feedback.groups))
    rounds = [(places, feedback.groups, feedback.said, feedback.notes)]
    rounds += [(again.places, again.groups, again.said, again.notes) for again in feedback.further]
    last = {place: number for number, (places, *_) in enumerate(rounds) for place in places}
    fates = _fates(feedback)
    for number, (places, groups, said, notes) in enumerate(rounds):
        columns = _columns(notes, groups)
        for p, (place, group) in enumerate(zip(places, groups, strict=True)):
            answer = (place, number, p, group, said, columns[p])
            if last[place] == number:
                yield _Answer(*answer, *fates[place])
            else:
                again = feedback.further[number]  # the next round
                lacked = dict(zip(again.places, again.lacked, strict=False))
                yield _Answer(*answer, reason=RESAMPLED, resampled_for=lacked.get(place))


def _fates(feedback: Feedback) -> list[tuple[tuple[Pair, ...], str | None, Mapping[str, int]]]:
    """The pairs of each prompt of a step, why there are none, and what was left out, after the last round."""
    pairing, (groups, _) = feedback.pairing, latest(feedback)
    assert pairing is not None
    pairs: dict[int, list[Pair]] = {}
    for pair in pairing.pairs:
        pairs.setdefault(id(pair.group), []).append(pair)
    return [
        (tuple(pairs.get(id(group), ())), reason, pairing.left_out_of.get(place, {}))
        for place, (group, reason) in enumerate(zip(groups, reasons(groups, pairing), strict=True))
    ]


def _columns(notes: Notes | None, groups: Sequence[Group]) -> list[dict[str, Sequence[Any]]]:
    """The columns that reward functions noted, cut into those of each group."""
    ends = list(accumulate(len(group.completions) for group in groups))
    starts = [0, *ends]
    columns = {} if notes is None else notes.columns
    return [
        {name: values[start:end] for name, values in columns.items()} for start, end in zip(starts, ends, strict=False)
    ]


def _record(of: StepTrained, answer: _Answer, pieces: Pieces) -> GroupRecord:
    prompt, trained = answer.group.prompt, _trained_completions(of, answer)
    scores = answer.said.scores if isinstance(answer.said, Verdicts) else answer.said
    penalties = answer.said.penalties
    return GroupRecord(
        step=of.step,
        rank=of.rank,
        index=answer.place,
        round=answer.round,
        prompt=prompt.content,
        prompt_row=prompt.row,
        prompt_length=len(prompt.token_ids),
        completions=tuple(
            _completion(
                completion,
                {} if scores is None else _parts(scores, answer.p, k),
                penalties[answer.p][k] if penalties else {},
                None if k not in trained else (pieces(completion.token_ids), trained[k]),
            )
            for k, completion in enumerate(answer.group.completions)
        ),
        prompt_cut=prompt.cut,
        columns=prompt.columns,
        pairs=tuple(_pair(pair, of.pairs.get(id(pair))) for pair in answer.pairs),
        reason=answer.reason,
        resampled_for=answer.resampled_for,
        left_out=answer.left_out,
        comparisons=_comparisons(answer.said, answer.p),
        notes=answer.notes,
        skipped=of.skipped,
    )


def _trained_completions(of: StepTrained, answer: _Answer) -> dict[int, TrainedCompletion | None]:
    """The completions that stand in pairs, by their places in the group."""
    trained: dict[int, TrainedCompletion | None] = {}
    for pair in answer.pairs:
        said = of.pairs.get(id(pair))
        trained[pair.chosen] = None if said is None else said.chosen
        trained[pair.rejected] = None if said is None else said.rejected
    return trained


def _parts(scores: Scores, p: int, k: int) -> dict[str, Any]:
    """What a completion's score was made of, as fields of its record."""
    rewards = {name: rows[p][k] for name, rows in scores.by_scorer.items()}
    score, ranking = scores.values[p][k], scores.ranking[p][k]
    return dict(
        rewards=rewards,
        weighted={
            name: None if reward is None else reward * scores.weights[name]
            for name, reward in rewards.items()
            if name in scores.weights
        },
        normalized={name: rows[p][k] for name, rows in scores.relative.items()},
        score=score,
        ranking=ranking if ranking != score else None,
    )


def _completion(
    completion: Completion,
    parts: Mapping[str, Any],
    penalties: Mapping[str, float],
    trained: tuple[list[str], TrainedCompletion | None] | None,
) -> CompletionRecord:
    tokens, said = trained or ((), None)
    return CompletionRecord(
        text=completion.text,
        length=len(completion.token_ids),
        finish=completion.finish_reason,
        author=completion.author,
        version=completion.policy_version,
        penalties=penalties,
        sampled_logp=sum(completion.logprobs) if completion.logprobs else None,
        tokens=tokens,
        log_ratios=() if said is None else said.log_ratios,
        logp=None if said is None else said.logp,
        ref_logp=None if said is None else said.ref_logp,
        **parts,
    )


def _pair(pair: Pair, said: TrainedPair | None) -> PairRecord:
    return PairRecord(
        pair.chosen,
        pair.rejected,
        pair.probability,
        pair.margin,
        pair.weight,
        None if said is None else said.loss,
        None if said is None else said.implied,
    )


def _comparisons(said: Scores | Verdicts, p: int) -> tuple[ComparisonRecord, ...]:
    if not isinstance(said, Verdicts) or not said.comparisons:
        return ()
    return tuple(
        ComparisonRecord(
            one.first, one.second, one.probability, tuple(_order(one, question) for question in one.questions)
        )
        for one in said.comparisons[p]
    )


def _order(comparison: Comparison, question: Question) -> OrderRecord:
    first, second = comparison.first, comparison.second
    return OrderRecord(
        (second, first) if question.swapped else (first, second),
        question.probability,
        question.words,
        question.seconds,
        question.tokens,
        question.cost,
        question.failure,
        question.cached,
    )
