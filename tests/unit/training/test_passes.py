"""`PassRunner`, built alone: passes that do not fit are split, and all of the step's are made again."""

from datetime import timedelta

import pytest
import torch

from online_dpo.distributed.agreement import Agreement
from online_dpo.distributed.collectives import RankErrors
from online_dpo.packing.pack import pack_pairs
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.passes import PassRunner
from online_dpo.training.stopwatch import PhaseTimer
from online_dpo.types import Pair
from support import tiny

PAIRS = [
    Pair(tiny.group(prompt, [[5 + p, 1], [6 + p, 1]]), 0, 1) for p, prompt in enumerate(tiny.prompts([4, 4, 4, 4, 4]))
]  # 8 tokens each


class Device:
    """Runs passes of at most ``room`` pairs; the gradient is the sum of their prompts' rows."""

    def __init__(self, room):
        self.room, self.gradient, self.freed = room, 0, 0
        self.passes: list[list[int]] = []
        self.metrics = MetricStore()
        phase = PhaseTimer(self.metrics, torch.device("cpu"))
        agreement, errors = Agreement(timedelta(seconds=9)), RankErrors(torch.device("cpu"))
        self.runner = PassRunner(self.metrics, phase, lambda: 0, agreement, errors, self.drop, self.free)

    def drop(self):
        self.gradient = 0

    def free(self):
        self.freed += 1

    def one_pass(self, rows, last):
        numbers = [pair.group.prompt.row + 1 for pair in rows.pairs]
        self.passes.append(numbers)
        self.metrics.mean("seen", [float(number) for number in numbers])
        if len(numbers) > self.room:
            self.gradient += 1000  # a backward pass that broke off leaves a part behind
            raise torch.OutOfMemoryError
        self.gradient += sum(numbers)
        return torch.tensor(float(sum(numbers)))

    def run(self, *sizes):
        start, losses = 0, []
        self.runner.begin_step()
        for size in sizes:
            rows = pack_pairs(PAIRS[start : start + size], shared=True)
            losses.append(float(self.runner.run(rows, self.one_pass)))
            start += size
        return losses


def test_passes_that_fit_are_run_once():
    device = Device(room=3)
    assert device.run(3, 2) == [6.0, 9.0] and device.gradient == 15 and device.passes == [[1, 2, 3], [4, 5]]


@pytest.mark.smoke
def test_a_pass_that_does_not_fit_is_split_and_the_step_begun_anew():
    device = Device(room=2)
    assert device.run(1, 4) == [1.0, 14.0]
    assert device.gradient == 15 and device.freed == 1 and device.runner.tokens_that_fit == 16
    assert device.passes == [[1], [2, 3, 4, 5], [1], [2, 4], [3, 5]]
    metrics = device.metrics.drain()
    assert metrics["seen"] == 3.0  # each pair once: not what was abandoned, nor what was made again
    assert device.run(4) == [10.0] and device.passes[5:] == [[1, 3], [2, 4]]  # split from now on, before it fails


def test_a_single_pair_is_tried_once_more_with_what_could_be_freed():
    device = Device(room=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"1 pair\(s\).*Lower `max_tokens_per_pass`"):
        device.run(1)
    assert device.passes == [[1], [1]] and device.freed == 2
    roomier = Device(room=0)
    roomier.free = lambda: setattr(roomier, "room", 1)
    roomier.runner._free_memory = roomier.free
    assert roomier.run(1) == [1.0] and roomier.gradient == 1
    freed = []
    roomier.runner._free_memory = lambda: freed.append(1)
    assert roomier.run(2) == [3.0] and roomier.runner.tokens_that_fit == 8
    assert len(freed) == 2, "at the begin of the step, since a pair has needed it before; and once more"


def test_passes_that_were_done_before_are_split_as_well():
    device = Device(room=3)
    device.runner.begin_step()
    for pairs in (PAIRS[:3], PAIRS):
        device.room = 3 if len(pairs) == 3 else 2
        device.runner.run(pack_pairs(pairs, shared=True), device.one_pass)
    assert device.runner.tokens_that_fit == 20 and max(map(len, device.passes[2:])) == 2
    assert device.gradient == 6 + 15
    assert device.metrics.drain()["seen"] == pytest.approx(21 / 8)


def test_gradients_are_exchanged_in_the_last_part_of_the_last_pass_alone():
    device, seen = Device(room=1), []

    def one_pass(rows, last):
        seen.append((len(rows.pairs), last))
        return device.one_pass(rows, last)

    for last in (False, True):
        device.runner.begin_step()
        device.runner.run(pack_pairs(PAIRS[:2], shared=True), one_pass, last)
    assert seen == [(2, False), *[(1, False)] * 3, (1, True)]
