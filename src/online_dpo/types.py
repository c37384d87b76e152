"""What the stages hand to each other: small frozen dataclasses, no behaviour beyond views.

Shape suffixes, used in the whole package: ``P`` prompts, ``K`` completions of one prompt, ``N`` pairs, ``R`` rows of a
batch, ``T`` tokens, ``C`` completion tokens, ``V`` vocabulary. ``scores_PK`` is a tensor of prompts by completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]
"""One chat message: ``{"role": "user", "content": "..."}``."""

FinishReason = Literal["stop", "length"]
"""``stop``: the engine met an end token or a stop string. ``length``: it ran out of ``max_new_tokens``."""


@dataclass(frozen=True)
class Prompt:
    """What the policy answers, tokenised and truncated once.

    >>> Prompt(content="Name a colour.", token_ids=(5, 81, 7), row=12, columns={"label": "red"})

    ``content`` is what scorers see (text, or a list of messages); ``token_ids`` is what the policy samples from and is
    trained on; ``row`` is the prompt's place in its dataset, which seeds its completions; ``columns`` are the row's
    other columns; ``invalid`` says why a streamed row cannot be used (such a prompt is counted, never sampled).
    """

    content: str | list[Message]
    token_ids: tuple[int, ...]
    row: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    invalid: str | None = None

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.content, str)


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    >>> Completion(token_ids=(9, 4, 2), logprobs=(-0.1, -1.3, -0.2), finish_reason="stop", policy_version=7,
    text="Red.")

    ``token_ids`` ends with the end token when the model produced one. ``logprobs`` holds, for every token, the
    log-probability under the unmodified policy (temperature 1, no truncation of the distribution). ``text`` is decoded
    without special tokens. ``policy_version`` is the number of optimizer steps behind the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str


@dataclass(frozen=True)
class Group:
    """One prompt and its K completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Scores:
    """The numbers of a batch of groups: ``values[p][k]``, ``None`` where a score is missing.

    ``by_scorer`` keeps what each scorer said, before weights and penalties, under the scorer's name.

    >>> Scores(values=[[0.7, None]], by_scorer={"length_reward": [[0.7, None]]})
    """

    values: list[list[float | None]]
    by_scorer: Mapping[str, list[list[float | None]]]


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected completion of one group, as indices into ``group.completions``.

    ``chosen_score`` and ``rejected_score`` are ``None`` when a judge ranked the two without numbers. ``margin`` is
    their difference.

    >>> Pair(group=group, chosen=1, rejected=0, chosen_score=2.0, rejected_score=-1.0)
    """

    group: Group
    chosen: int
    rejected: int
    chosen_score: float | None = None
    rejected_score: float | None = None

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
class PackedRows:
    """Sequences ready for a model, and which of them form pairs.

    A row is ``[padding | prompt | completion]``: completions end at the right edge, so a model has to project only
    the last ``completion_length`` positions onto the vocabulary.

    Fields: ``ids_RT``, ``attention_mask_RT`` (1 where a real token stands) and ``positions_RT`` (0 at each row's first
    real token) are int64; ``completion_mask_RC`` is bool and covers the last ``C = completion_length`` positions;
    ``chosen_N`` and ``rejected_N`` are row indices; ``weight_N`` is 1 for a pair and 0 for a stand-in; ``score_R`` is
    each completion's score (float64), nan where a judge ranked without numbers.
    """

    ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor
    positions_RT: torch.Tensor
    completion_mask_RC: torch.Tensor
    chosen_N: torch.Tensor
    rejected_N: torch.Tensor
    weight_N: torch.Tensor
    score_R: torch.Tensor

    @property
    def completion_length(self) -> int:
        return self.completion_mask_RC.shape[1]

    @property
    def completion_ids_RC(self) -> torch.Tensor:
        return self.ids_RT[:, self.ids_RT.shape[1] - self.completion_length :]

    def to(self, device: torch.device | str) -> PackedRows:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True)
class RowLogprobs:
    """What a model says of the completions in a batch of rows.

    ``token_logps_RC`` is fp32 and 0 outside completions; ``logps_R`` is its sum over each completion; ``entropy_RC`` is
    the entropy of each next-token distribution in nats, 0 outside completions, without gradient.
    """

    token_logps_RC: torch.Tensor
    entropy_RC: torch.Tensor

    @property
    def logps_R(self) -> torch.Tensor:
        return self.token_logps_RC.sum(dim=1)
