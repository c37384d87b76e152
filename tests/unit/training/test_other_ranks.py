"""A rank that is left writes the random states of all, if it knows them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import TrainerState

from online_dpo.distributed import collectives
from online_dpo.errors import RankLostError
from online_dpo.training import other_ranks
from online_dpo.training.other_ranks import OtherRanks


class Board:
    """What ranks write for each other, without a store: the part of `RankWatch` that is used."""

    def __init__(self, rank, size, notes):
        self.rank, self.size, self.limit, self.step, self._notes, self.told = rank, size, 0.5, 0, notes, []

    has_lost_store = False

    def put(self, name, value):
        self._notes[name] = value

    def get(self, name):
        return self._notes.get(name)

    def missing(self):
        return []

    def tell_failure(self, error):
        self.told.append(error)


class Metrics:
    """What each rank saves for itself."""

    value = 0

    def save(self, folder, rank):
        (folder / f"metrics-{rank}.json").write_text(str(self.value))


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks; and `only_process` without accelerate's state, which one process alone does not have."""
    monkeypatch.setattr(other_ranks, "only_process", collectives.without_others)
    notes = {}
    return [OtherRanks(Board(rank, 3, notes), Metrics(), False) for rank in range(3)]


def ends_step(rank, step, seed):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    rank.on_step_end(None, TrainerState(global_step=step), None)


def saving(rank, error, step, folder):
    with rank.saving_after(error, False, step) as may_save:
        assert rank.stands_in == may_save
        rank.write_files(folder)
        return may_save


def test_the_first_rank_left_writes_the_states_of_all(ranks, tmp_path):
    for seed, rank in enumerate(ranks):
        ends_step(rank, 7, seed)
    assert saving(ranks[1], RankLostError("gone", [0]), 7, tmp_path)
    names = {f"rng_state_{rank}.pth" for rank in range(3)} | {f"metrics-{rank}.json" for rank in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == names and not ranks[1].stands_in
    for seed in range(3):
        state = torch.load(tmp_path / f"rng_state_{seed}.pth", weights_only=False)
        torch.manual_seed(seed), random.seed(seed)
        assert torch.equal(state["cpu"], torch.get_rng_state()) and state["python"] == random.getstate()
    assert ranks[1]._watch.told and not ranks[2]._watch.told


def test_after_a_log_the_metrics_since_then_count(ranks, tmp_path):
    for rank in ranks:
        rank._own_part.value = 5
        ends_step(rank, 7, seed=rank._watch.rank)
        torch.manual_seed(99)  # as an evaluation may, before it is logged
        rank._own_part.value = 0
        rank.on_log(None, TrainerState(global_step=7), None)
    assert saving(ranks[0], RankLostError("gone", [2]), 7, tmp_path)
    assert [(tmp_path / f"metrics-{rank}.json").read_text() for rank in range(3)] == ["0"] * 3
    torch.manual_seed(2)
    state = torch.load(tmp_path / "rng_state_2.pth", weights_only=False)
    assert torch.equal(state["cpu"], torch.get_rng_state())


def test_the_others_wait_until_it_has_saved_and_save_nothing(ranks, tmp_path):
    for rank in ranks:
        ends_step(rank, 7, 0)
    ranks[0]._watch.put("saved", b"")
    assert not saving(ranks[2], RankLostError("gone", [1]), 7, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("known", [(0, 1), ()])
def test_nothing_is_saved_if_a_state_is_unknown(ranks, tmp_path, known):
    for rank in ranks:
        ends_step(rank, 6, 0)
    for number in known:
        ends_step(ranks[number], 7, 0)
    assert not saving(ranks[0], RankLostError("gone", [2]), 7, tmp_path)


def test_the_step_before_is_known_while_one_rank_is_ahead(ranks, tmp_path):
    for rank in ranks:
        ends_step(rank, 6, 0)
    ends_step(ranks[2], 7, 0)
    assert saving(ranks[0], RankLostError("gone", [2]), 6, tmp_path)


def test_nothing_is_saved_if_lost_ranks_held_feedback_or_are_unknown(ranks, tmp_path):
    for rank in ranks:
        ends_step(rank, 7, 0)
    assert not saving(OtherRanks(ranks[0]._watch, Metrics(), True), RankLostError("gone", [2]), 7, tmp_path)
    assert not saving(ranks[0], RankLostError("nobody knows", []), 7, tmp_path)


def test_a_rank_that_fails_alone_tells_the_others_and_saves_nothing(ranks, tmp_path):
    error = ValueError("no")
    with ranks[1].saving_after(error, False, 7) as may_save:
        assert not may_save
    assert ranks[1]._watch.told == [error]
    with ranks[1].saving_after(error, True, 7) as may_save:
        assert may_save and not ranks[1].stands_in


def test_a_full_disk_does_not_end_the_step(ranks, tmp_path, monkeypatch):
    def full(folder, rank):
        raise OSError(28, "No space left on device")

    for rank in ranks:
        ends_step(rank, 6, 0)
    monkeypatch.setattr(ranks[1]._own_part, "save", full)
    for rank in ranks:
        ends_step(rank, 7, 0)
    assert not saving(ranks[0], RankLostError("gone", [2]), 7, tmp_path)


def test_a_single_process_saves_as_ever(tmp_path):
    alone = OtherRanks(None, Metrics(), False)
    ends_step(alone, 1, 0)
    with alone.saving_after(ValueError("no"), False, 1) as may_save, alone.guarded():
        assert may_save and not alone.stands_in
