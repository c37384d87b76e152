"""Which groups of a step are recorded: evenly over ranks, the same when it is done again, others in another step."""

from __future__ import annotations

from collections import Counter

import pytest

from online_dpo.runs.choice import chosen_places, share_of_rank


@pytest.mark.parametrize("groups", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_groups_evenly_and_take_turns(groups: int, ranks: int) -> None:
    totals: Counter[int] = Counter()
    for step in range(ranks):
        shares = [share_of_rank(groups, step, rank, ranks) for rank in range(ranks)]
        assert sum(shares) == groups
        assert max(shares) - min(shares) <= 1
        totals.update(dict(enumerate(shares)))
    assert set(totals.values()) == {groups} or groups == 0


def test_a_choice_depends_on_seed_step_and_row_alone() -> None:
    rows = list(range(100, 132))
    made = chosen_places(rows, 5, seed=3, step=7)

    assert made == sorted(made) and len(set(made)) == 5
    assert chosen_places(rows, 5, seed=3, step=7) == made
    turned = rows[::-1]
    assert sorted(turned[p] for p in chosen_places(turned, 5, 3, 7)) == [rows[p] for p in made]
    assert chosen_places(rows, 5, seed=3, step=8) != made
    assert chosen_places(rows, 5, seed=4, step=7) != made


def test_every_row_has_its_turn() -> None:
    counts = Counter(place for step in range(2000) for place in chosen_places(range(8), 2, seed=42, step=step))

    assert sum(counts.values()) == 4000
    assert all(420 < counts[place] < 580 for place in range(8))


def test_fewer_groups_than_wanted_are_all_chosen() -> None:
    assert chosen_places([5, 5, 9], 10, seed=1, step=1) == [0, 1, 2]
    assert chosen_places([5, 5, 9], 0, seed=1, step=1) == []
    assert chosen_places([], 3, seed=1, step=1) == []
