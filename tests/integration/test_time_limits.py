"""`reward_timeout` in runs, and notices about what is waited for."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest

from online_dpo.distributed.waiting import WAITS
from online_dpo.errors import ScoringError
from support.training import dataset, trainer, weights, word_reward

RUN = dict(max_steps=3, reward_timeout=0.5)


def hangs_after(step, seconds=3.0):
    def hangs(completions, trainer_state, **_):
        if trainer_state.global_step >= step:
            time.sleep(seconds)
        return word_reward(completions)

    return hangs


def ends_in_time(made, pattern):
    with pytest.raises(ScoringError) as caught:
        made.train()
    assert re.match(pattern, str(caught.value)), str(caught.value)
    [note] = caught.value.__notes__
    assert Path(note.rpartition(" ")[2]).name == f"checkpoint-{made.state.global_step}"


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_reward_that_hangs_ends_the_run_after_a_checkpoint(tmp_path, max_staleness):
    made = trainer(tmp_path, reward_funcs=hangs_after(1), max_staleness=max_staleness, **RUN)
    pattern = r"Reward function `hangs` took longer than `reward_timeout` allows, 0\.5 seconds \(among rows [\d, ]+\)\."
    ends_in_time(made, pattern)


def test_a_gold_reward_that_hangs_in_an_evaluation_does_too(tmp_path):
    gold = dict(eval_dataset=dataset(lengths=(4, 5)), eval_reward_funcs=hangs_after(2))
    made = trainer(tmp_path, kwargs=gold, eval_strategy="steps", eval_steps=2, **RUN)
    ends_in_time(made, "Reward function `hangs` took longer than `reward_timeout` allows")
    assert made.state.global_step == 2


def test_a_time_limit_changes_nothing_of_a_healthy_run(tmp_path):
    limited, free = (trainer(tmp_path / str(limit), max_steps=2, reward_timeout=limit) for limit in (30.0, None))
    for made in (limited, free):
        made.train()
    of_free = weights(free.model)
    assert all(weight.equal(of_free[name]) for name, weight in weights(limited.model).items())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_time_limit_is_above_0(tmp_path, value):
    with pytest.raises(ValueError, match="`reward_timeout`"):
        trainer(tmp_path, reward_timeout=value)


def test_a_notice_says_who_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(WAITS, "after", 1.5)
    with caplog.at_level(logging.WARNING, "online_dpo.distributed.waiting"):
        trainer(tmp_path, reward_funcs=hangs_after(0, seconds=3.5), max_steps=1).train()
    notices = [message for message in caplog.messages if message.startswith("Waiting for")]
    assert notices and all(re.fullmatch(r"Waiting for [23] s: Reward function `hangs`\.", n) for n in notices)
