"""Which groups of a step are recorded, where only some are: the same ones when the step is done again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def share_of_rank(groups: int, step: int, rank: int, ranks: int) -> int:
    """The number of groups that a rank records in a step, of so many over all ranks.

    Shares differ by one at most; the ranks that record one more take turns.

    >>> [share_of_rank(5, step=0, rank=rank, ranks=2) for rank in range(2)]
    [3, 2]
    """
    return groups // ranks + ((rank - step) % ranks < groups % ranks)


def chosen_places(rows: Sequence[int], count: int, seed: int, step: int) -> list[int]:
    """The places of ``count`` groups among those of a rank, in order; all of them if there are no more.

    ``rows`` are their prompts' numbers in the dataset. A choice looks random and depends on seed, step and row alone,
    so that a run that was resumed makes it again.
    """
    places = sorted(range(len(rows)), key=lambda place: (_draw(seed, step, rows[place]), place))
    return sorted(places[: max(0, count)])


def _draw(seed: int, step: int, row: int) -> bytes:
    return hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
