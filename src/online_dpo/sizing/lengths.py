"""The tokens of the fullest passes, from lengths of prompts and completions.

A pass has at most so many tokens (`max_tokens_per_pass`), and one group at least. Its rows are as long as its longest
group, and groups that fit share one, so that a pass with short groups and a long one has more padding than others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

STEPS, MOST_DRAWN = 50, 20_000
"""Steps that are drawn to find the fullest pass, and the most groups of them all."""


@dataclass(frozen=True)
class Fullest:
    """Tokens with padding: of the largest pass that has others of its step before it, of the largest that is the only
    one of its step (0 if there is none), and of all completions of a step with their prompts, as a reward model reads
    them.
    """

    beside: int
    alone: int
    scored: int


def fullest_pass(
    prompts: Sequence[int],
    completions: Sequence[int],
    *,
    per_batch: int,
    batches: int,
    most_tokens: int,
    num_completions: int,
    scored_at_once: int,
    seed: int = 0,
) -> Fullest:
    """Returns the sizes of the fullest passes of some steps, whose lengths are drawn from those that are given.

    Args:
        per_batch: prompts of a micro-batch; ``batches``: micro-batches of a step.
        most_tokens: `max_tokens_per_pass`.
        num_completions: K; a pair is trained of each group.
        scored_at_once: completions that the reward model reads at a time.
    """
    rng = random.Random(seed)
    drawn = min(per_batch, MOST_DRAWN // 10)
    most = most_tokens if drawn == per_batch else min(most_tokens, most_tokens * drawn // per_batch + max(prompts))
    steps = max(1, min(STEPS, MOST_DRAWN // (drawn * min(batches, 2))))

    def groups(count: int, answers: int) -> list[int]:
        return [rng.choice(prompts) + sum(rng.choices(completions, k=answers)) for _ in range(count)]

    beside, alone, scored = 0, 0, 0
    for _ in range(steps):
        sizes = [padded(part) for _ in range(min(batches, 2)) for part in split(groups(drawn, 2), most)]
        if len(sizes) == 1:
            alone = max(alone, sizes[0])
        else:
            beside = max(beside, *sizes[1:])
        read = min(max(1, scored_at_once // num_completions), drawn)
        scored = max(scored, padded(groups(read, num_completions)))
    scale = per_batch / drawn
    return Fullest(round(beside * scale), round(alone * scale), scored)


def split(groups: Sequence[int], most: int) -> list[list[int]]:
    """Divides groups of these lengths into as few passes of about equal size as keep to ``most`` tokens each."""
    for parts in range(max(1, math.ceil(sum(groups) / most)), len(groups) + 1):
        passes: list[list[int]] = [[] for _ in range(parts)]
        for length in sorted(groups, reverse=True):
            min(passes, key=sum).append(length)
        if all(len(one) <= 1 or sum(one) <= most for one in passes):
            return passes
    return [[length] for length in groups]


def padded(groups: Sequence[int]) -> int:
    """Tokens of the rows that groups of these lengths are packed into: first fit, the longest first.

    >>> padded([200, 100, 90, 60])
    600
    """
    width, rows = max(groups), []
    for length in sorted(groups, reverse=True):
        place = next((i for i, used in enumerate(rows) if used + length <= width), None)
        if place is None:
            rows.append(length)
        else:
            rows[place] += length
    return width * len(rows)
