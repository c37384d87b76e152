"""The arithmetic of benchmarks/scale.py, by value; and its command on the logs of real runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import environment
from support.training import trainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from scale import Phase, Run, Split, Step, Traffic, best_split, cost_per_million, fit, learn, run_of  # noqa: E402

STEP = Step(
    rollout=Phase(fixed=1.0, divided=12.0),
    scoring=Phase(divided=2.0),
    training=Phase(divided=8.0),
    sync=Phase(fixed=0.5, each=0.25),
    other=Phase(fixed=0.5),
    completions=64,
)


def run(trainers, servers, staleness=0, prompts=16, **seconds):
    return Run(trainers, servers, staleness, seconds, prompts)


def test_in_turn_all_phases_add_up():
    assert STEP.seconds(1, 1) == 13 + 2 + 0.75 + 8 + 0.5
    assert STEP.seconds(4, 2) == 7 + 0.5 + 1.0 + 2 + 0.5


def test_trainers_that_sample_themselves_share_everything():
    assert STEP.seconds(4, 0) == 4 + 0.5 + 0.75 + 2 + 0.5


def test_one_step_ahead_takes_the_longer_of_sampling_and_training():
    assert STEP.seconds(1, 4, staleness=1) == max(1.5, 2) + max(4, 8.5)  # scoring beside sending
    assert STEP.seconds(4, 1, staleness=1) == max(0.75, 0.5) + max(13, 2.5)


def test_more_steps_ahead_hide_the_scoring():
    assert STEP.seconds(1, 4, staleness=2) == 1.5 + 8.5
    slow = Step(Phase(fixed=1.0), Phase(fixed=30.0), Phase(fixed=2.0), Phase(), Phase(), completions=1)
    assert slow.seconds(1, 1, staleness=1) == 32
    assert slow.seconds(1, 1, staleness=2) == 15.5  # two threads wait for a judge at the same time
    assert slow.seconds(1, 1, staleness=4) == 7.75


def test_cores_limit_what_runs_at_the_same_time():
    assert STEP.seconds(4, 4, cores=2) == STEP.seconds(2, 2) + 2 * 0.25  # weights still go to four servers
    assert STEP.seconds(1, 1, staleness=1, cores=2) == STEP.seconds(1, 1, staleness=1)
    assert STEP.seconds(1, 1, staleness=1, cores=1) == 2 + (13 + 8.5)  # one core: no overlap at all
    assert STEP.seconds(2, 2, staleness=1, cores=2) == 1 + (2 * 4.5 + 2 * 7) / 2


def test_traffic_between_trainers():
    assert Traffic(8e9, 1e9).seconds(1) == 0
    assert Traffic(8e9, 1e9).seconds(4) == 12  # 2 (n - 1) / n
    assert Traffic(8e9, 1e9, sharded=True).seconds(4) == 18
    assert Traffic(8e9, 1e9, sharded=True, passes=2).seconds(4) == 30


def parts(phase):
    return [phase.fixed, phase.divided, phase.each]


def test_fits_recover_the_parts():
    phase = Phase(fixed=2.0, divided=6.0)
    assert parts(fit([(n, phase.seconds(n)) for n in (1, 2, 4)])) == pytest.approx([2.0, 6.0, 0.0])
    growing = Phase(fixed=1.0, each=0.5)
    assert parts(fit([(n, growing.seconds(n)) for n in (1, 3)], by="each")) == pytest.approx([1.0, 0.0, 0.5])


def test_one_number_of_processes_divides_all_or_grows_nothing():
    assert fit([(2, 3.0), (2, 5.0)]) == Phase(divided=8.0)
    assert fit([(2, 3.0)], by="each") == Phase(fixed=3.0)


def test_no_part_is_negative():
    assert fit([(1, 8.0), (2, 3.0)]).fixed == 0  # better than divided: two caches, for example
    assert fit([(1, 3.0), (2, 4.0)]) == Phase(fixed=3.5)  # slower with two: nothing divides


def test_learning_from_runs():
    runs = [
        run(1, 1, rollout=13.0, scoring=2.0, training=8.0, sync=0.75, all=24.25),
        run(2, 1, rollout=13.0, scoring=1.0, training=4.0, sync=0.75, all=19.25),
        run(1, 2, rollout=7.0, scoring=2.0, training=8.0, sync=1.0, all=18.5),
    ]
    learned = learn(runs, completions=4)
    assert learned.completions == 64
    for trainers, servers, staleness in ((1, 1, 0), (2, 2, 0), (8, 3, 1)):
        assert learned.seconds(trainers, servers, staleness) == pytest.approx(
            STEP.seconds(trainers, servers, staleness)
        )


def test_a_service_that_scores_is_not_divided():
    one = run(1, 1, rollout=1.0, scoring=6.0, training=1.0, sync=0.0, all=8.0)
    assert learn([one], 2, scoring_divides=False).scoring.seconds(8) == 6
    assert learn([one], 2).scoring.seconds(8) == 0.75


def test_traffic_is_not_counted_as_computing():
    two = run(2, 1, rollout=1.0, scoring=0.0, training=5.0, sync=0.0, all=6.0)
    learned = learn([two], 2, traffic=Traffic(1e9, 1e9))
    assert learned.training == Phase(divided=8.0)  # one second of the five is sending
    assert learned.seconds(4, 1) == 1 + 2 + 1.5


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([run(1, 1, 1, all=1.0)], "max_staleness: 0"),
        ([run(1, 1), run(1, 0)], "one kind at a time"),
        ([run(1, 1), run(2, 1, prompts=32)], "other numbers of prompts"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(runs, said):
    with pytest.raises(ValueError, match=said):
        learn(runs, 2)


def test_best_split():
    tried = {(8 - m, m): STEP.seconds(8 - m, m, 1) for m in range(1, 8)}
    best = best_split(STEP, 8, staleness=1)
    assert tried[best.trainers, best.servers] == best.seconds == min(tried.values())
    assert best == Split(3, 5, max(0.5 + 0.25 * 5, 2 / 3) + 1 + 12 / 5)
    assert best_split(STEP, 8, 1, least_trainers=6).trainers == 6
    assert best_split(STEP, 8, 1, per_server=4) == Split(4, 1, STEP.seconds(4, 1, 1))
    with pytest.raises(ValueError, match="too few"):
        best_split(STEP, 8, 1, per_server=4, least_trainers=6)


def test_cost_of_a_million_completions():
    assert cost_per_million(8, 2.5, seconds=36.0, completions=1000) == 200.0


def test_a_log_holds_sums_over_the_steps_since_the_one_before():
    def entry(step, seconds):
        return {"step": step, "prompts": 80.0, "time/all": seconds, "time/rollout": seconds / 2}

    log = [entry(5, 900.0), entry(10, 20.0), {"step": 10, "eval_loss": 1.0}, entry(20, 40.0), {"step": 20}]
    got = run_of(log, 2, 1, 0)
    assert got.seconds == {"rollout": 2.0, "scoring": 0, "training": 0, "sync": 0, "all": 4.0}
    assert got.prompts == 160 / 15 and got.other == 2.0
    with pytest.raises(ValueError, match="train longer"):
        run_of(log[:1], 1, 1, 0)


def test_the_command_on_a_real_run(tmp_path):
    """The built-in engine: phases of the log add up to nearly all of the step, and so does what is predicted."""
    made = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    made.train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    words = ["--run", f"1,0,0:{path}", "--completions", "2", "--gpus", "1", "4", "--price", "3.6"]
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["1", "1", "0"], ["4", "4", "0"]]
    log = json.loads(path.read_text())["log_history"]
    per_step = run_of(log, 1, 0, 0).seconds["all"]
    assert float(rows[0][3]) == pytest.approx(per_step, abs=0.01)
    assert float(rows[0][5]) == pytest.approx(3.6 * per_step / 3600 / 8 * 1e6, rel=0.1)
    refused = subprocess.run([*command, "--gpus"], capture_output=True, text=True, env=environment(), timeout=300)
    assert refused.returncode == 2
    command[3] = f"1,0:{path}"
    refused = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert refused.returncode == 2 and "write trainers,servers,max_staleness" in refused.stderr
