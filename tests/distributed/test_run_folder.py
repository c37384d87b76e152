"""The record of runs of two processes: each rank writes its own groups, and a resumed run has every row once."""

import subprocess
import sys
from pathlib import Path

import pytest

from online_dpo.runs.layout import completions_files
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.state import state_of
from support.processes import environment
from support.ranks import RANKS

sys.path.insert(0, str(Path(__file__).parent))
from record_worker import CASES, STEPS  # noqa: E402

WORKER = Path(__file__).with_name("record_worker.py")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    for command, what in (
        ([sys.executable], "runs"),
        (RANKS, "runs"),
        (RANKS, "others"),
        ([sys.executable], "others"),
    ):
        done = subprocess.run(
            [*command, str(WORKER), str(out), what],
            env=environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-6000:]
    return out


def metrics_of(folder):
    rows = [row for row in RunFolder(folder).metrics().rows if "train_runtime" not in row]
    left_out = ("time", "perf/", "train/updated_ratio", "restored")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def groups_of(folder):
    run = RunFolder(folder)
    groups = [group for at in run.all_frames() for group in run.groups(at)]
    return {(g["step"], g["rank"], g["index"], g["round"]): g for g in groups}, len(groups)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(out, case, processes):
    whole, resumed = out / f"{case}-whole-{processes}", out / f"{case}-resumed-{processes}"
    assert metrics_of(resumed) == metrics_of(whole) and len(metrics_of(whole)) == STEPS
    (groups, count), (expected, _) = groups_of(resumed), groups_of(whole)
    assert groups == expected and len(groups) == count
    assert {file.rank for file in completions_files(whole)} == set(range(processes))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_with_another_number_of_processes_there_is_every_row_once(out, case, processes):
    """Files of ranks that are gone are cut as well."""
    folder = out / f"{case}-moved-{processes}"
    assert [row["step"] for row in metrics_of(folder)] == list(range(1, STEPS + 1))
    groups, count = groups_of(folder)
    assert len(groups) == count
    prompts = sorted((group["step"], group["prompt_row"]) for group in groups.values() if group["round"] == 0)
    if case != "some":
        whole = groups_of(out / f"{case}-whole-1")[0].values()
        assert prompts == sorted((group["step"], group["prompt_row"]) for group in whole if group["round"] == 0)
    else:
        assert all(sum(step == number for step, _ in prompts) == 3 for number in range(1, STEPS + 1))


@pytest.mark.parametrize("case", CASES)
def test_events_of_the_run_are_told_once_and_both_ranks_say_how_it_ended(out, case):
    folder = out / f"{case}-resumed-2"
    events = RunFolder(folder).events().rows
    assert [event["kind"] for event in events if event["rank"] == 0 and event["kind"] in ("start", "resume")] == [
        "start",
        "start",
        "resume",
    ]
    assert sorted(event["rank"] for event in events if event["kind"] == "end") == [0, 0, 1, 1]
    assert all(event["rank"] == 0 for event in events if event["kind"] in ("start", "checkpoint", "resume"))
    assert state_of(folder) == "finished"
