"""Comparisons of replies, on which the quickstart's reward model and judges are trained."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from online_dpo.quickstart.language import Request, contrast_replies, prompt_of, sample_reply
from online_dpo.quickstart.rubric import rubric


@dataclass(frozen=True)
class Reply:
    """A reply, and whether it ended by itself (an end token follows) or was cut at a length limit (none follows)."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class Comparison:
    """Replies to one prompt, and preferences between them: ``(2, 0)`` in ``wins`` means that reply 2 beat reply 0."""

    prompt: str
    replies: tuple[Reply, ...]
    wins: tuple[tuple[int, int], ...]


def sample_comparisons(requests: Sequence[Request], seed: int) -> list[Comparison]:
    """Sample up to six replies to each request, and a preference for each two with different rubric scores.

    A preference is wrong with probability ``1 / (1 + exp(gap))``, where ``gap`` is the difference of the two scores
    (Bradley and Terry 1952), so that most errors are between replies of similar quality. Two replies are plain, one of
    them right; two more differ in one trait, most often in correctness. Two thirds of the requests have two more
    replies, which are independent and of any quality, some broken, some cut at a length limit.
    """
    rng = random.Random(seed)
    comparisons = []
    for request in requests:
        texts = [*contrast_replies(request, rng, "plain"), *contrast_replies(request, rng)]
        replies = [Reply(text) for text in dict.fromkeys(texts)]
        if rng.random() < 2 / 3:
            replies += [_any_reply(request, rng), _any_reply(request, rng)]
        scores = [rubric(request.text, reply.text) for reply in replies]
        wins = [
            (first, second) if rng.random() < preference_by_gap(scores[first] - scores[second]) else (second, first)
            for first, second in combinations(range(len(replies)), 2)
            if scores[first] != scores[second]
        ]
        if wins:
            comparisons.append(Comparison(prompt_of(request), tuple(replies), tuple(wins)))
    return comparisons


def preference_by_gap(gap: float) -> float:
    """The probability that the first of two replies is preferred, if its score is higher by ``gap``."""
    return 1 / (1 + math.exp(-gap))


def _any_reply(request: Request, rng: random.Random) -> Reply:
    (quality,) = rng.choices(("mixed", "good", "poor", "broken"), weights=(4, 2, 1, 3))
    text = sample_reply(request, rng, quality)
    if rng.random() < 0.07:
        words = text.split(" ")
        return Reply(" ".join(words[: rng.randint(1, len(words))]), ended=False)
    return Reply(text)
