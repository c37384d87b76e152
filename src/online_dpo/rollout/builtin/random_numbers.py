"""Counter-based random numbers: a function of (seed, step, stream, row, sample) alone (Philox, Salmon et al. 2011)."""

from __future__ import annotations

import numpy as np

from online_dpo.rollout.params import RolloutKey


def uniform_numbers(key: RolloutKey, row: int, sample: int, count: int) -> np.ndarray:
    """``count`` uniform numbers in [0, 1), (count,) float32, that depend on (seed, step, stream, row, sample) alone.

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to random bits.
    Drawing increments the first word of the counter only, so sequences that differ in one of the other three words
    never overlap.
    """
    philox = np.random.Philox(key=[key.seed, key.step], counter=[0, key.stream, row, sample])
    return np.random.Generator(philox).random(count, dtype=np.float32)
