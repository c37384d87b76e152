"""`PassRunner`, built alone: passes that do not fit are split, and all of the step's are made again."""

import pytest
import torch

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

    def __init__(self, room, num_processes=1):
        self.room, self.gradient, self.freed = room, 0, 0
        self.passes: list[list[int]] = []
        self.metrics = MetricStore()
        phase = PhaseTimer(self.metrics, torch.device("cpu"))
        self.runner = PassRunner(self.metrics, phase, lambda: 0, num_processes, self.drop, self.free)

    def drop(self):
        self.gradient = 0

    def free(self):
        self.freed += 1

    def one_pass(self, rows):
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


def test_a_single_pair_and_several_processes_cannot_be_split():
    with pytest.raises(torch.OutOfMemoryError, match=r"1 pair\(s\)"):
        Device(room=0).run(1)
    with pytest.raises(torch.OutOfMemoryError, match="Lower `max_tokens_per_pass`"):
        Device(room=1, num_processes=2).run(2)
