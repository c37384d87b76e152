"""`judge: human` in real runs: votes that reach a waiting trainer, nobody who votes, a stop, and what is refused."""

import signal
import threading
import time

import pytest

from online_dpo.errors import TrainingInterrupted
from online_dpo.runs.questions import questions_of, waiting
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.votes import Vote, add_vote, votes_of
from support import training


class Voter:
    """A person who prefers the longer text, until ``limit`` votes are given. Use as a context."""

    def __init__(self, folder, limit=1000):
        self.folder, self.limit, self.votes = folder, limit, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._vote)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()

    def _vote(self):
        while not self._over.wait(0.02):
            for question in waiting(questions_of(self.folder).values(), votes_of(self.folder), time.time()):
                if self.votes < self.limit:
                    first = len(question.first) > len(question.second)
                    choice = "first" if first else "second"
                    add_vote(self.folder, Vote(question.prompt, question.first, question.second, choice, time.time()))
                    self.votes += 1


def human_trainer(folder, **fields):
    fields = dict(num_completions=2, per_device_train_batch_size=2, human_timeout=600.0) | fields
    return training.trainer(folder, reward_funcs=None, kwargs={"judge": "human"}, **fields)


def test_a_run_learns_from_a_persons_votes(tmp_path):
    made = human_trainer(tmp_path, max_steps=2, reward_timeout=0.01, max_failure_share=0.0)
    with Voter(tmp_path) as voter:
        made.train()
    logs = training.train_logs(made)
    assert [log["pairs/count"] for log in logs] == [2.0, 2.0]
    assert sum(log["judge/votes"] for log in logs) == voter.votes == 4
    lengths = [(len(vote.preferred), len(vote.first), len(vote.second)) for vote in votes_of(tmp_path).values()]
    assert all(preferred == max(both) for preferred, *both in lengths)


def test_the_record_of_a_run_has_what_people_said(tmp_path):
    made = human_trainer(tmp_path, max_steps=1, run_folder=True, human_timeout=6.0)
    with Voter(tmp_path, limit=1):
        made.train()
    run = RunFolder(tmp_path)
    orders = [one["orders"] for at in run.all_frames() for row in run.groups(at) for one in row["comparisons"]]
    assert sorted(len(asked) for asked in orders) == [1, 1]
    told = [order["probability"] for [order] in orders]
    assert None in told and (1.0 in told or 0.0 in told)
    assert [order["failure"] for [order] in orders if order["probability"] is None] == ["nobody voted in time"]
    rows = [row for at in run.all_frames() for row in run.groups(at)]
    assert sorted(row.get("reason", "") for row in rows) == ["", "no_answer"]


def test_with_four_completions_there_are_several_rounds(tmp_path):
    made = human_trainer(tmp_path, num_completions=4)
    with Voter(tmp_path) as voter:
        made.train()
    [log] = training.train_logs(made)
    assert log["pairs/count"] == 2.0 and voter.votes > 4
    assert log["rewards/chosen"] is not None


def test_a_run_on_which_nobody_votes_goes_on_and_does_not_stall(tmp_path):
    made = human_trainer(tmp_path, max_steps=3, human_timeout=3.0, max_idle_steps=1)
    with Voter(tmp_path, limit=2):
        made.train()
    logs = training.step_logs(made)
    assert made.state.global_step == 3
    assert [log.get("dropped/no_answer", 0.0) for log in logs] == [0.0, 2.0, 2.0]


def test_ctrl_c_ends_the_wait_and_the_resumed_run_takes_the_votes_that_stand(tmp_path):
    """Its weights are those of a run that was not stopped."""

    def stop_at(number):
        while len(questions_of(tmp_path / "stopped")) < number:
            time.sleep(0.02)
        time.sleep(0.6)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    whole = human_trainer(tmp_path / "whole", max_steps=3)
    with Voter(tmp_path / "whole"):
        whole.train()
    stopped = human_trainer(tmp_path / "stopped", max_steps=3)
    threading.Thread(target=stop_at, args=(4,)).start()
    with Voter(tmp_path / "stopped", limit=3), pytest.raises(TrainingInterrupted) as stop:
        stopped.train()
    assert stopped.state.global_step == 1 and stop.value.checkpoint is not None
    resumed = human_trainer(tmp_path / "stopped", max_steps=3)
    with Voter(tmp_path / "stopped") as voter:
        resumed.train(resume_from_checkpoint=stop.value.checkpoint)
    assert voter.votes == 3  # one of step 2, two of step 3
    expected = training.weights(whole.model)
    assert all((weight == expected[name]).all() for name, weight in training.weights(resumed.model).items())


def test_processes_that_would_give_up_before_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.config.trainer_config.OnlineDPOConfig.world_size", 2)
    with pytest.raises(ValueError, match="Raise `ddp_timeout`"):
        human_trainer(tmp_path, human_timeout=3600.0, ddp_timeout=1800)


@pytest.mark.parametrize("seconds", [0.0, float("inf"), -1.0])
def test_an_impossible_time_limit_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="human_timeout"):
        training.config(tmp_path, human_timeout=seconds)
