"""What the stages hand to each other: small frozen dataclasses, no behaviour beyond views.

Shape suffixes, used in the whole package: ``P`` prompts, ``K`` completions of one prompt, ``N`` pairs, ``R`` rows of a
batch, ``T`` tokens of a row, ``S`` completions in a batch, ``M`` tokens of all these completions, ``H`` hidden size,
``V`` vocabulary. ``scores_PK`` is a tensor of prompts by completions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]
"""One chat message: ``{"role": "user", "content": "..."}``."""

FinishReason = Literal["stop", "length"]
"""``stop``: the engine met an end token or a stop string. ``length``: it ran out of ``max_new_tokens``."""

Author = Literal["policy", "reference", "mixture"]
"""Who wrote a completion; ``mixture`` is a geometric mixture of policy and reference."""


@dataclass(frozen=True)
class Prompt:
    """What the policy answers, tokenised and truncated once.

    >>> Prompt(content="Name a colour.", token_ids=(5, 81, 7), row=12, columns={"label": "red"})

    ``content`` is what scorers see (text, or a list of messages); ``token_ids`` is what the policy samples from and is
    trained on; ``row`` is the prompt's place in its dataset, which seeds its completions; ``columns`` are the row's
    other columns; ``invalid`` says why a streamed row cannot be used (such a prompt is counted, never sampled); ``cut``
    says whether it was longer.
    """

    content: str | list[Message]
    token_ids: tuple[int, ...]
    row: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    invalid: str | None = None
    cut: bool = False

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.content, str)


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    >>> Completion(token_ids=(9, 4, 2), logprobs=(-0.1, -1.3, -0.2), finish_reason="stop", policy_version=7,
    text="Red.")

    ``token_ids`` ends with the end token when the model produced one. ``logprobs`` holds, for every token, the
    log-probability under its unmodified author (temperature 1, no truncation of the distribution). ``text`` is what
    they add to the prompt's text, without special tokens (see `rollout.completion_text`). ``policy_version`` is the
    number of optimizer steps behind the weights that sampled it; of a completion that the policy did not write it says
    nothing.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str
    author: Author = "policy"

    @property
    def by_policy(self) -> bool:
        return self.author == "policy"


@dataclass(frozen=True)
class Group:
    """One prompt and its K completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Scores:
    """The numbers of a batch of groups: ``values[p][k]``, ``None`` where a score is missing.

    ``by_scorer`` keeps what each scorer said, before weights and penalties, under the scorer's name. ``normalized``
    has the numbers made of normalised scorers, if any is: pairs are formed by these, and only compare within a group,
    while ``values`` are what is reported.

    What they were made of: ``weights`` of the scorers; ``relative`` has what normalisation made of a scorer's numbers,
    where there is one, before its weight; ``penalties`` are those of each completion that are not 0, by name (an empty
    list without any).

    >>> Scores(values=[[0.7, None]], by_scorer={"length_reward": [[0.7, None]]})
    """

    values: list[list[float | None]]
    by_scorer: Mapping[str, list[list[float | None]]]
    normalized: list[list[float | None]] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    relative: Mapping[str, list[list[float | None]]] = field(default_factory=dict)
    penalties: list[list[dict[str, float]]] = field(default_factory=list)

    @property
    def ranking(self) -> list[list[float | None]]:
        """The numbers that pairs are formed by."""
        return self.values if self.normalized is None else self.normalized


@dataclass(frozen=True)
class Preference:
    """What a judge says of a group: which completion is its best and which its worst, as indices, and the probability
    that the former is better than the latter.

    >>> Preference(chosen=2, rejected=0, probability=0.9)
    """

    chosen: int
    rejected: int
    probability: float


@dataclass(frozen=True)
class Question:
    """A question about two completions that a judge asked a model, or a function, and what it was told.

    ``swapped`` says that the second completion was shown first. ``probability`` is that the one shown first is better;
    without an answer it is ``None``, and ``failure`` says why. ``words`` is the answer as it was given, ``seconds`` how
    long it took, ``tokens`` and ``cost`` what it used, as far as they are known. ``cached``: it is an answer that was
    given before.

    >>> Question(swapped=False, probability=0.9, words="Answer 1 is clearer.", seconds=0.8, tokens=512)
    """

    swapped: bool
    probability: float | None
    words: str | None = None
    seconds: float | None = None
    tokens: int | None = None
    cost: float | None = None
    failure: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two completions of a group that a judge compared, as indices, and the probability that the first is better, after
    penalties; ``None`` without an answer. ``questions`` are those behind it, of a judge that tells them.

    >>> Comparison(first=0, second=1, probability=0.8)
    """

    first: int
    second: int
    probability: float | None
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """A judge's preference for each group, ``None`` where it gave no answer.

    ``duels`` is the number of comparisons that it was asked for, ``unanswered`` the number of those without an answer.
    ``scores`` are those by which it was shown the best completions only. ``comparisons`` are those of each group;
    ``penalties`` are as in `Scores`. Both are empty in checkpoints of version 0.1.

    >>> Verdicts(preferences=[Preference(1, 0, 0.8), None], duels=2, unanswered=1)
    """

    preferences: list[Preference | None]
    duels: int
    unanswered: int
    scores: Scores | None = None
    comparisons: list[tuple[Comparison, ...]] = field(default_factory=list)
    penalties: list[list[dict[str, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Round:
    """Prompts of a step that were answered once more: their places among the step's groups, and what came of it.

    ``lacked`` says of each why its answers before gave no pair; ``notes`` are of these answers.

    >>> Round(places=[3], groups=[group], said=Scores([[0.7, 0.1]], {}), lacked=["tie"])
    """

    places: list[int]
    groups: list[Group]
    said: Scores | Verdicts
    lacked: list[str] = field(default_factory=list)
    notes: Notes | None = None


@dataclass(frozen=True)
class Notes:
    """What reward functions have noted beside their scores: numbers for the metrics, and columns with one value for
    each completion, group by group.

    >>> Notes(metrics={"parsed": [1.0, 0.0]}, columns={"answer": ["5", "7", None, "5"]})
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Feedback:
    """What became of the prompts of a step: its groups, and what is said of them, by scorers or by a judge.

    ``seconds`` has an entry for "rollout" and one for "scoring". ``further`` are the rounds in which groups without a
    pair were replaced; ``groups``, ``said`` and ``notes`` are of the first answers all the same. ``pairing`` is what
    was made of all rounds in the end; ``None`` until pairs have been formed, and in checkpoints of version 0.1.

    >>> Feedback(groups=[group], said=Scores([[0.7, 0.1]], {}), seconds={"rollout": 1.5, "scoring": 0.2})
    """

    groups: list[Group]
    said: Scores | Verdicts
    seconds: Mapping[str, float]
    further: tuple[Round, ...] = ()
    notes: Notes | None = None
    pairing: Pairing | None = None


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected completion of one group, as indices into ``group.completions``.

    ``chosen_score`` and ``rejected_score`` are ``None`` when a judge compared the two without numbers. ``margin`` is
    their difference, below 0 where something else has decided (a judge, normalised scores). ``probability`` is that the
    chosen one is better, 0.5 to 1; ``weight`` is what the pair counts in the mean over pairs, above 0.

    >>> Pair(group=group, chosen=1, rejected=0, chosen_score=2.0, rejected_score=-1.0)
    """

    group: Group
    chosen: int
    rejected: int
    chosen_score: float | None = None
    rejected_score: float | None = None
    probability: float = 1.0
    weight: float = 1.0

    @property
    def chosen_completion(self) -> Completion:
        return self.group.completions[self.chosen]

    @property
    def rejected_completion(self) -> Completion:
        return self.group.completions[self.rejected]

    @property
    def margin(self) -> float | None:
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True)
class Pairing:
    """What became of groups.

    ``dropped`` counts the groups without a pair by reason, ``left_out`` the pairs that were left out of groups which
    have others. ``reasons`` and ``left_out_of`` say the same of each of these groups, by its place; `drop` and
    `leave_out` keep both.
    """

    pairs: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    left_out_of: dict[int, Counter[str]] = field(default_factory=dict)

    def drop(self, place: int, reason: str) -> None:
        """Says why the group at a place gave no pair."""
        self.dropped[reason] += 1
        self.reasons[place] = reason

    def leave_out(self, place: int, reasons: Collection[str]) -> None:
        """Says why pairs were left out of the group at a place, which has others; one reason for each pair."""
        self.left_out.update(reasons)
        if reasons:
            self.left_out_of[place] = Counter(reasons)


@dataclass(frozen=True)
class TokenRows:
    """Tokens in rows, and which of them see each other.

    With ``shares_prompts``, a row holds one or several trees ``[prompt | completion 1 | ... | completion K]``, then
    padding. A token sees the tokens before it that belong to its own tree and to the prompt or its own completion.
    Without, a row is ``[prompt | completion | padding]`` and plain causal attention is right.

    Fields, all int64 of shape (R, T): ``ids_RT``; ``positions_RT``, each token's place in its own sequence (every
    completion goes on from the end of its prompt); ``tree_RT``, -1 on padding; ``branch_RT``, 0 in a prompt and 1 to K
    in completions.
    """

    ids_RT: torch.Tensor
    positions_RT: torch.Tensor
    tree_RT: torch.Tensor
    branch_RT: torch.Tensor
    shares_prompts: bool

    def to(self, device: torch.device | str) -> TokenRows:
        return _moved(self, device)


@dataclass(frozen=True)
class PackedRows:
    """Sequences ready for a model, and which of them form pairs.

    The M tokens of the S completions, one completion after the other: ``source_M`` is the place that predicts each (an
    index into the flattened rows), ``target_M`` its id; ``read_X`` are these places in ascending order, each once, and
    ``length_S`` is the number of tokens of each completion.
    ``chosen_N`` and ``rejected_N`` are indices of completions; ``probability_N`` and ``weight_N`` are those of the
    pairs, and a stand-in has weight 0; ``sampled_logps_M`` is what the sampler gave each token; ``score_S`` is each
    completion's score (float64), nan where a judge compared without numbers; ``by_policy_S`` (bool) says whether the
    policy wrote it. ``pairs`` are the pairs themselves, none for a stand-in.
    """

    tokens: TokenRows
    source_M: torch.Tensor
    read_X: torch.Tensor
    target_M: torch.Tensor
    sampled_logps_M: torch.Tensor
    length_S: torch.Tensor
    chosen_N: torch.Tensor
    rejected_N: torch.Tensor
    probability_N: torch.Tensor
    weight_N: torch.Tensor
    score_S: torch.Tensor
    by_policy_S: torch.Tensor
    pairs: tuple[Pair, ...]

    def to(self, device: torch.device | str) -> PackedRows:
        return _moved(self, device)


@dataclass(frozen=True)
class RowLogprobs:
    """What a model says of the S completions in a batch of rows, token by token.

    ``token_logps_M`` and ``entropy_M`` are fp32: the log-probability of each completion token, and the entropy of the
    next-token distribution it was picked from, in nats and without gradient. ``logps_S`` is the sum of the
    log-probabilities over each completion.
    """

    token_logps_M: torch.Tensor
    entropy_M: torch.Tensor
    logps_S: torch.Tensor


Movable = TypeVar("Movable", TokenRows, PackedRows)


def _moved(rows: Movable, device: torch.device | str) -> Movable:
    values = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return replace(rows, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})
