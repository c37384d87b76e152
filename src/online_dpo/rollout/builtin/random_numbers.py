"""Random numbers that depend on (seed, step, row, sample) alone (Philox, Salmon et al. 2011)."""

from __future__ import annotations

import numpy as np

from online_dpo.rollout.params import RolloutKey


def uniform_numbers(key: RolloutKey, row: int, sample: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float32, that depend on nothing but (seed, step, stream, row, sample).

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to random bits.
    It counts up in the counter's first word, so different values in the other three never meet.
    """
    philox = np.random.Philox(key=[key.seed, key.step], counter=[0, key.stream, row, sample])
    return np.random.Generator(philox).random(count, dtype=np.float32)
