"""A step that has been begun: its prompts, what was sampled for it, its feedback; and all of this in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from online_dpo.errors import CheckpointError
from online_dpo.pairing.rounds import latest
from online_dpo.runs.plain_json import plain_or_named
from online_dpo.types import Completion, Feedback, Group, Notes, Pair, Pairing, Prompt, Round, Scores, Verdicts


@dataclass(frozen=True)
class Fetched:
    """The prompts of a step: ``num_prompts`` were read, in ``num_batches`` batches; ``prompts`` are those without an
    error.
    """

    prompts: list[Prompt]
    num_prompts: int
    num_batches: int


@dataclass(frozen=True)
class SampledRound:
    """The groups that were sampled in one round, for the prompts at these places among those of the step.

    >>> SampledRound(places=[0, 1], groups=[group, other], seconds=1.5)
    """

    places: list[int]
    groups: list[Group]
    seconds: float


@dataclass
class Samples:
    """The completions of a step as far as they have been sampled: the opponent's, and all of each round.

    The thread that answers the step adds rounds; others read them after it has ended. What fails later, such as a
    reward, can be asked again about the same completions.
    """

    opponent: list[Group]
    opponent_seconds: float
    rounds: list[SampledRound] = field(default_factory=list)


@dataclass(frozen=True)
class BegunStep:
    """A step that is being answered, or has been."""

    step: int
    fetched: Fetched
    samples: Samples
    feedback: Future[Feedback]


@dataclass(frozen=True)
class SavedRound:
    """A `SampledRound` in a file, and what was said of its groups; ``None`` if they have yet to be assessed. ``lacked``
    and ``notes`` are those of a `Round`.
    """

    places: list[int]
    completions: list[tuple[Completion, ...]]
    seconds: float
    said: Scores | Verdicts | None
    lacked: list[str] = field(default_factory=list)
    notes: Notes | None = None


@dataclass(frozen=True)
class SavedPair:
    """A `Pair` in a file: its group is a place among those of the step, after the last round."""

    group: int
    chosen: int
    rejected: int
    chosen_score: float | None
    rejected_score: float | None
    probability: float
    weight: float


@dataclass(frozen=True)
class SavedStep:
    """A `BegunStep` in a file.

    Prompts are read from the dataset again when a run is resumed, with all their columns; a file holds what identifies
    them, row and token ids. ``seconds`` is ``None`` if the step has no feedback yet.
    """

    step: int
    rows: list[int]
    prompt_ids: list[tuple[int, ...]]
    opponent: list[tuple[Completion, ...]]
    opponent_seconds: float
    rounds: list[SavedRound]
    seconds: Mapping[str, float] | None
    notes: Notes | None
    pairs: list[SavedPair]
    dropped: Mapping[str, int]
    left_out: Mapping[str, int]
    reasons: list[str | None] = field(default_factory=list)
    left_out_of: list[dict[str, int]] = field(default_factory=list)

    def is_of(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these are the prompts of the step."""
        return self.rows == [p.row for p in prompts] and self.prompt_ids == [p.token_ids for p in prompts]

    def restored(self, prompts: Sequence[Prompt]) -> tuple[Samples, Feedback | None]:
        """Returns what was sampled, and the feedback if there was one, for the prompts of the step.

        Raises:
            CheckpointError: numbers in the file do not fit together.
        """
        try:
            opponent = _groups(prompts, range(len(prompts)), self.opponent)
            rounds = [
                SampledRound(one.places, _groups(prompts, one.places, one.completions), one.seconds)
                for one in self.rounds
            ]
            _require(not rounds or rounds[0].places == list(range(len(prompts))), "the first round is not of all")
            samples = Samples(opponent, self.opponent_seconds, rounds)
            return samples, None if self.seconds is None else self._feedback(rounds, self.seconds)
        except (ValueError, IndexError) as problem:
            raise CheckpointError(
                f"What the checkpoint holds of step {self.step} is damaged ({problem}). Give another checkpoint."
            ) from None

    def _feedback(self, rounds: Sequence[SampledRound], seconds: Mapping[str, float]) -> Feedback:
        said = [_fitting(one.said, sampled.groups) for one, sampled in zip(self.rounds, rounds, strict=True)]
        _require(bool(rounds), "there is no round")
        further = tuple(
            Round(one.places, one.groups, what, saved.lacked, saved.notes)
            for saved, one, what in zip(self.rounds[1:], rounds[1:], said[1:], strict=True)
            if one.places
        )
        feedback = Feedback(rounds[0].groups, said[0], seconds, further, self.notes)
        groups, _ = latest(feedback)
        pairs = [_pair(pair, groups) for pair in self.pairs]
        reasons = {place: reason for place, reason in enumerate(self.reasons) if reason is not None}
        left_out_of = {place: Counter(left_out) for place, left_out in enumerate(self.left_out_of) if left_out}
        pairing = Pairing(pairs, Counter(self.dropped), Counter(self.left_out), reasons, left_out_of)
        return replace(feedback, pairing=pairing)


def saved_step(begun: BegunStep) -> SavedStep:
    """Returns a step as a checkpoint holds it. It must have ended: with its feedback, or in an error."""
    feedback = None if begun.feedback.exception() is not None else begun.feedback.result()
    samples, prompts = begun.samples, begun.fetched.prompts
    pairing = Pairing() if feedback is None or feedback.pairing is None else feedback.pairing
    places = {} if feedback is None else {id(group): place for place, group in enumerate(latest(feedback)[0])}
    return SavedStep(
        step=begun.step,
        rows=[prompt.row for prompt in prompts],
        prompt_ids=[prompt.token_ids for prompt in prompts],
        opponent=[group.completions for group in samples.opponent],
        opponent_seconds=samples.opponent_seconds,
        rounds=_saved_rounds(samples, feedback),
        seconds=None if feedback is None else feedback.seconds,
        notes=None if feedback is None or feedback.notes is None else _plain_notes(feedback.notes),
        pairs=[
            SavedPair(
                places[id(pair.group)],
                pair.chosen,
                pair.rejected,
                pair.chosen_score,
                pair.rejected_score,
                pair.probability,
                pair.weight,
            )
            for pair in pairing.pairs
        ],
        dropped=dict(pairing.dropped),
        left_out=dict(pairing.left_out),
        reasons=[pairing.reasons.get(place) for place in range(len(prompts))],
        left_out_of=[dict(pairing.left_out_of.get(place, {})) for place in range(len(prompts))],
    )


def _saved_rounds(samples: Samples, feedback: Feedback | None) -> list[SavedRound]:
    further = {} if feedback is None else {id(one.groups): one for one in feedback.further}
    first = None if feedback is None else feedback.groups
    saved = []
    for one in samples.rounds:
        later = further.get(id(one.groups))
        said = feedback.said if feedback is not None and one.groups is first else None if later is None else later.said
        lacked = [] if later is None else later.lacked
        notes = None if later is None or later.notes is None else _plain_notes(later.notes)
        completions = [group.completions for group in one.groups]
        saved.append(SavedRound(one.places, completions, one.seconds, said, lacked, notes))
    return saved


def _plain_notes(notes: Notes) -> Notes:
    """The notes with values that JSON has; of others, which are only shown, their type stays."""
    return Notes(notes.metrics, {name: [_plain(value) for value in values] for name, values in notes.columns.items()})


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    if type(value) is dict:
        return {str(key): _plain(item) for key, item in value.items()}
    return plain_or_named(value)


def _groups(prompts: Sequence[Prompt], places: Sequence[int], completions: Sequence[Any]) -> list[Group]:
    for of_prompt in completions:
        for one in of_prompt:
            _require(len(one.logprobs) == len(one.token_ids), "a completion has not one log-probability for each token")
    _require(all(place >= 0 for place in places), "a place is negative")
    return [Group(prompts[place], of_prompt) for place, of_prompt in zip(places, completions, strict=True)]


def _fitting(said: Scores | Verdicts | None, groups: Sequence[Group]) -> Scores | Verdicts:
    """What was said of groups, once it is known to be of so many."""
    if said is None:
        _require(not groups, "a round has no scores")
        return Scores([], {})
    sizes = [len(group.completions) for group in groups]
    scores = said.scores if isinstance(said, Verdicts) else said
    if scores is not None:
        tables = [
            scores.values,
            *scores.by_scorer.values(),
            *scores.relative.values(),
            *([] if scores.normalized is None else [scores.normalized]),
        ]
        _require(
            all([len(row) for row in table] == sizes for table in tables), "scores are not one for each completion"
        )
    if isinstance(said, Verdicts):
        for preference, size in zip(said.preferences, sizes, strict=True):
            _require(preference is None or _are_two(preference.chosen, preference.rejected, size), "a preference")
        _require(len(said.comparisons) in (0, len(sizes)), "comparisons are not those of each group")
        for compared, size in zip(said.comparisons, sizes, strict=False):
            _require(all(_are_two(one.first, one.second, size) for one in compared), "a comparison")
    penalties = [[] if scores is None else scores.penalties, said.penalties if isinstance(said, Verdicts) else []]
    fit = all(not table or [len(row) for row in table] == sizes for table in penalties)
    _require(fit, "penalties are not of each completion")
    return said


def _pair(saved: SavedPair, groups: Sequence[Group]) -> Pair:
    _require(0 <= saved.group < len(groups), "a pair is of no group")
    group = groups[saved.group]
    _require(_are_two(saved.chosen, saved.rejected, len(group.completions)), "a pair is not of two completions")
    return Pair(**{**vars(saved), "group": group})


def _are_two(chosen: int, rejected: int, of: int) -> bool:
    return 0 <= chosen < of and 0 <= rejected < of and chosen != rejected


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
