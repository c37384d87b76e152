"""The learning rate falls after a skipped step and recovers, and the schedule never sees it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Adafactor, TrainerState

from online_dpo.training.learning_rate import LearningRateBackoff
from online_dpo.training.step_guard import StepGuard


class Run:
    """Steps of one parameter under SGD, whose gradient is always 1: each update is the learning rate."""

    def __init__(self, factor: float, recovery: int, schedule: Any = None) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.parameter], lr=1.0)
        self.schedule = schedule(self.optimizer) if schedule else None
        self.skips = False
        self.backoff = LearningRateBackoff(factor, recovery, trains=lambda: not self.skips)
        self.arguments: Any = (None, TrainerState(), None)

    def step(self, skips: bool = False) -> float:
        """How far the parameter goes."""
        self.skips, before = skips, self.parameter.item()
        self.parameter.grad = None if skips else torch.ones_like(self.parameter)
        if skips:
            self.backoff.on_skip()
        self.backoff.on_pre_optimizer_step(*self.arguments, optimizer=self.optimizer)
        self.optimizer.step()
        self.backoff.on_optimizer_step(*self.arguments, optimizer=self.optimizer)
        if self.schedule is not None:
            self.schedule.step(
                *([1.0] if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
            )
        return before - self.parameter.item()


def test_after_a_skipped_step_it_is_lowered_and_recovers_geometrically() -> None:
    run = Run(0.25, recovery=4)
    assert [run.step(), run.step(skips=True)] == [1.0, 0.0]
    assert [run.step() for _ in range(6)] == pytest.approx([0.25, 0.25**0.75, 0.5, 0.25**0.25, 1.0, 1.0], rel=1e-12)
    assert run.optimizer.param_groups[0]["lr"] == 1.0 and run.backoff.debt == 0


def test_skipped_steps_multiply() -> None:
    run = Run(0.5, recovery=2)
    assert [run.step(skips) for skips in (True, True, False, False)] == pytest.approx([0, 0, 0.25, 0.25 * 2**0.5])
    assert run.step(skips=True) == 0.0
    assert [run.step() for _ in range(5)] == pytest.approx([0.25, 0.25 * 2**0.5, 0.5, 0.5**0.5, 1.0])


def test_a_factor_of_1_changes_nothing() -> None:
    run = Run(1.0, recovery=3)
    assert [run.step(skips) for skips in (True, False, True, False)] == [0.0, 1.0, 0.0, 1.0]
    assert not run.backoff.is_on and run.backoff.debt == 0


SCHEDULES = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),  # reads the optimizer's
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=20, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_goes_on_as_it_would_have(name: str) -> None:
    plain, lowered = Run(1.0, 3, SCHEDULES[name]), Run(0.5, 3, SCHEDULES[name])
    scheduled, used = [], []
    for skips in (False, True, False, False, True, False, False, False, False, False):
        plain.step(skips), used.append(lowered.step(skips))
        scheduled.append(plain.optimizer.param_groups[0]["lr"])
        assert lowered.optimizer.param_groups[0]["lr"] == scheduled[-1]
    before = [1.0 if name != "one cycle" else plain.optimizer.param_groups[0]["initial_lr"], *scheduled[:-1]]
    factors = [1, 0, 0.5, 0.5 ** (2 / 3), 0, 0.5 ** (4 / 3), 0.5, 0.5 ** (2 / 3), 0.5 ** (1 / 3), 1]
    assert used == pytest.approx([rate * factor for rate, factor in zip(before, factors, strict=True)], rel=1e-6)


def test_each_group_keeps_its_own_learning_rate() -> None:
    run = Run(0.5, 2)
    other = torch.nn.Parameter(torch.zeros(()))
    run.optimizer.add_param_group({"params": [other], "lr": torch.tensor(0.1)})
    run.step(skips=True)
    other.grad = torch.ones(())
    assert run.step() == 0.5 and other.item() == pytest.approx(-0.05)
    assert [float(group["lr"]) for group in run.optimizer.param_groups] == pytest.approx([1.0, 0.1])


def test_an_optimizer_that_chooses_its_own_is_refused() -> None:
    adafactor = Adafactor([torch.nn.Parameter(torch.zeros(()))], lr=None, relative_step=True)
    for backoff, refused in ((LearningRateBackoff(0.5, 2, lambda: True), True), (Run(1.0, 2).backoff, False)):
        if refused:
            with pytest.raises(ValueError, match="this optimizer chooses its own"):
                backoff.on_train_begin(None, TrainerState(), None, optimizer=adafactor)
        else:
            backoff.on_train_begin(None, TrainerState(), None, optimizer=adafactor)


def guard() -> StepGuard:
    return StepGuard(Accelerator(cpu=True), 3, 5, LearningRateBackoff(0.5, 7, lambda: True))


def test_the_counts_are_in_a_checkpoint_and_old_ones_have_fewer(tmp_path: Path) -> None:
    saved, restored = guard(), guard()
    saved.trained_steps, saved.skipped, saved.skipped_in_a_row, saved.backoff.debt = 9, 4, 2, 11
    saved.idle = Counter({"not finite": 2, "without a pair": 1})
    saved.save(tmp_path, rank=1)
    assert not [*tmp_path.iterdir()]
    saved.save(tmp_path, rank=0)
    restored.restore(tmp_path, rank=1)
    for one in ("trained_steps", "skipped", "skipped_in_a_row", "idle"):
        assert getattr(restored, one) == getattr(saved, one)
    assert restored.backoff.debt == 11
    (tmp_path / "guard.json").write_text(json.dumps({"trained_steps": 3}))
    restored.begin_run()
    restored.restore(tmp_path, rank=0)
    assert (restored.trained_steps, restored.skipped, restored.backoff.debt, restored.stalled) == (3, 0, 0, False)


def test_a_run_stalls_after_as_many_idle_steps_as_are_allowed() -> None:
    made = guard()
    made.idle.update({"without a pair": 3, "learning rate 0": 1})
    assert not made.stalled
    made.idle["not finite"] += 1
    assert made.stalled
    made.max_idle_steps = None
    assert not made.stalled
