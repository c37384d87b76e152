"""The fullest passes, against what packs them."""

import random

import pytest

from online_dpo.packing.microbatches import passes_needed, split_pairs
from online_dpo.packing.pack import pack_pairs
from online_dpo.sizing.lengths import fullest_pass, padded, split
from online_dpo.types import Completion, Group, Pair, Prompt


def pair(row, prompt, first, second):
    completions = tuple(Completion((7,) * n, (0.0,) * n, "stop", 0, "") for n in (first, second))
    return Pair(Group(Prompt("", (5,) * prompt, row), completions), 0, 1)


@pytest.mark.parametrize("seed", range(8))
def test_passes_are_those_of_training(seed):
    rng = random.Random(seed)
    pairs = [pair(row, rng.randint(5, 60), rng.randint(1, 90), rng.randint(1, 90)) for row in range(12)]
    sizes = [sum(map(len, (p.group.prompt.token_ids, *(c.token_ids for c in p.group.completions)))) for p in pairs]
    parts = split_pairs(pairs, passes_needed(pairs, 400))
    real = sorted(pack_pairs(part, True).tokens.ids_RT.numel() for part in parts)
    assert sorted(padded(part) for part in split(sizes, 400)) == real


def test_a_pass_that_is_alone_and_passes_that_follow_others():
    def fullest(batches, most):
        return fullest_pass(
            [10],
            [5],
            per_batch=4,
            batches=batches,
            most_tokens=most,
            num_completions=3,
            scored_at_once=6,
        )

    assert (fullest(1, 1000).alone, fullest(1, 1000).beside) == (80, 0)
    assert (fullest(1, 40).alone, fullest(1, 40).beside) == (0, 40)
    assert (fullest(2, 1000).alone, fullest(2, 1000).beside) == (0, 80)
    assert fullest(1, 1000).scored == 2 * 25  # six completions at a time are two groups


def test_a_huge_batch_takes_no_longer():
    sizes = fullest_pass(
        [100],
        [50],
        per_batch=10**6,
        batches=1,
        most_tokens=10**9,
        num_completions=2,
        scored_at_once=16,
    )
    assert sizes.alone == 200 * 10**6
