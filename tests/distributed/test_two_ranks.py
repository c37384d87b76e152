"""Two real processes against one: same gradient, metrics and decisions (architecture, invariant 2 and 11)."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import quantized, tiny
from support.endpoint import says, serving, shown
from support.processes import environment
from support.ranks import RANKS
from support.recorded import assert_together_those_of_one
from support.run_files import fill_folder, write_run_file
from support.training import assert_same

WORKER = Path(__file__).with_name("worker.py")
CASES = ["plain", "accumulated", "weighted", "xpo", "nash_md", "one_sided", "resampled", "stream", "uneven", "judged"]
CASES += ["qlora"]


def slowly_more_w1(body, number):
    first, second = shown(body)
    p_first = 0.5 + 0.4 * math.tanh(first.count("w1") - second.count("w1"))
    return says("A" if p_first >= 0.5 else "B", p_first, delay=0.05)


def shown_to(request):
    return shown(request.body)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    quantized.base_folder(out / "base")  # by one process: ranks leave saving to the first
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    asked = {}
    for command, processes in ((RANKS, 2), ([sys.executable], 1)):
        with serving(slowly_more_w1) as endpoint:
            done = subprocess.run(
                [*command, str(WORKER), str(out), str(processes), endpoint.url],
                env=own,
                capture_output=True,
                text=True,
                timeout=1200,
            )
        assert done.returncode == 0, done.stderr[-4000:]
        asked[processes] = endpoint

    def load(case):
        one = torch.load(out / f"{case}-of-1-rank-0.pt")
        return one, [torch.load(out / f"{case}-of-2-rank-{rank}.pt") for rank in range(2)]

    load.asked, load.out = asked, out
    return load


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_two_ranks_equals_that_of_one(results, case):
    one, two = results(case)
    for rank in two:
        assert_same(rank["gradient"], one["gradient"], 1e-5)
        assert all(torch.equal(rank["weights"][n], two[0]["weights"][n]) for n in rank["weights"])


@pytest.mark.parametrize("case", CASES)
def test_metrics_of_two_ranks_equal_those_of_one(results, case):
    one, two = results(case)
    assert two[0]["log"] == pytest.approx(one["log"], rel=1e-5, abs=1e-6)
    assert one["log"]["objective/kl"] != 0


@pytest.mark.parametrize("case", CASES)
def test_records_of_two_ranks_are_together_those_of_one(results, case):
    one, two = results(case)
    assert_together_those_of_one([rank["rows"] for rank in two], one["rows"])


def test_rows_repeated_to_fill_the_last_batch_are_not_trained_twice(results):
    _, two = results("uneven")
    assert two[0]["log"]["prompts"] == 2


def test_one_rank_without_pairs_is_a_case_of_its_own(results):
    one, _ = results("one_sided")
    assert one["log"]["pairs/count"] == 4 and one["log"]["dropped/missing_score"] == 4


def test_ranks_ask_a_judge_together_as_often_and_as_much_at_once_as_one(results):
    one, two = results.asked[1], results.asked[2]
    assert one.most_at_once == two.most_at_once == 4
    assert len(one.seen) == len(two.seen) > 30
    assert sorted(map(shown_to, one.seen)) == sorted(map(shown_to, two.seen))


def test_one_rank_that_samples_again_alone_is_a_case_of_its_own(results):
    """Both call the engine equally often, the other one with no prompts."""
    one, (first, last) = results("resampled")
    again = int(one["log"]["resample/groups"])
    assert 0 < one["log"]["resample/rescued"] < again <= 4
    assert first["calls"] == [4, 0, 0] and last["calls"][:2] == [4, again] and len(last["calls"]) == 3
    assert one["calls"][:2] == [8, again]


def test_the_first_rank_alone_reports(results):
    """One folder of the run with one process, one of that with two; with distributions and pairs."""
    folders = sorted((results.out / "runs" / "runs").iterdir())
    assert len(folders) == 2 and all(len(list(folder.iterdir())) == 1 for folder in folders)
    for folder in folders:
        [file] = folder.iterdir()
        assert b"samples/length" in file.read_bytes() and b"samples/pairs" in file.read_bytes()


def test_evaluation_counts_each_prompt_once(results):
    """Five prompts, batches of two, two ranks: the loader repeats prompts to fill the last batch."""
    one, two = results("evaluated")
    assert one["eval"]["eval_prompts"] == 5
    for rank in two:
        assert rank["eval"] == pytest.approx(one["eval"], rel=1e-5, abs=1e-6)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(results):
    _, two = results("not_finite")
    start = tiny.causal_lm(sharpness=1.0)
    for rank in two:
        assert all(torch.equal(p, rank["weights"][n]) for n, p in start.named_parameters())
        assert rank["log"]["guard/skipped_steps"] == 1
        assert len(rank["rows"]) == 4 and all(row["skipped"] for row in rank["rows"])
        assert all(math.isfinite(v) for k, v in rank["log"].items() if k != "grad_norm")


FAILURES = {
    "on_step_begin": "ForeignCodeError: Callback `FailsOnTheLastRank` in `on_step_begin` raised OSError: no space",
    "on_pre_optimizer_step": "ForeignCodeError: Callback `FailsOnTheLastRank` in `on_pre_optimizer_step` raised OS",
    "on_log": "ForeignCodeError: Callback `FailsOnTheLastRank` in `on_log` raised OSError: no space",
    "fails_in_step": "ScoringError: Reward function `fails_on_the_last_rank` raised ConnectionError: away",
    "fails_in_evaluation": "ScoringError: Reward function `fails_on_the_last_rank` raised ConnectionError: away",
}


@pytest.mark.parametrize(("case", "message"), FAILURES.items())
def test_what_fails_on_one_rank_ends_the_run_on_both_after_a_checkpoint(results, case, message):
    one, (first, last) = results(case)
    for ended in (one, last):
        assert ended["error"].startswith(message)
    assert first["error"].startswith("FeedbackLostError: Another process of this run failed")
    assert [ended["step"] for ended in (one, first, last)] == [1, 1, 1]
    assert one["checkpoints"] == last["checkpoints"] == ["checkpoint-1"]


def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_ends_all_with_the_same_line(results):
    one, two = results("fails_in_save")
    for ended in (one, *two):
        assert ended["error"].startswith("CheckpointError: checkpoint-2 could not be saved in ")
        assert "earlier checkpoints are as they were. Mend this, then resume from " in ended["error"]
        assert ended["step"] == 2 and ended["checkpoints"] == ["checkpoint-1"]
    assert two[0]["error"] == two[1]["error"] and " (process 1 of 2)." in two[0]["error"]


def test_ranks_tell_each_other_of_a_loss_that_is_not_finite(results):
    one, two = results("guard")
    assert one["dropped"] and all(rank["dropped"] for rank in two)


def test_processes_that_would_train_alone_are_refused(tmp_path):
    """On a CPU, torchrun without `use_cpu` makes no process group: both would train, into one folder."""
    folder = fill_folder(tmp_path, "def words(completions):\n    return [float(len(c.split())) for c in completions]\n")
    path = write_run_file(folder, reward_funcs="feedback.py:words", use_cpu=None, max_steps=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519"]
    own = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [*torchrun, "-m", "online_dpo", "train", str(path)], env=own, capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0 and not (folder / "out").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) in (1, 2), done.stderr  # torchrun ends the second process once the first has failed
    assert "2 processes were started (WORLD_SIZE), but this one trains as one of 1" in said[0]
    assert "`use_cpu: true` (`--use_cpu`, `use_cpu=True`)" in said[0]
