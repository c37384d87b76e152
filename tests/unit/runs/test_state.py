"""Whether a run goes on, from its events and from the process that they name."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from online_dpo.runs.directory import json_line
from online_dpo.runs.layout import EVENTS
from online_dpo.runs.state import state_of


def start(**changes):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
    return {"time": 1.0, "step": 0, "rank": 0, "kind": "start", "message": "", **own, **changes}


def end(code, state, rank=0):
    return {"time": 2.0, "step": 4, "rank": rank, "kind": "end", "message": "", "code": code, "state": state}


def state(folder, *rows):
    (folder / EVENTS).write_bytes(b"".join(map(json_line, rows)))
    return state_of(folder)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([start()], "running"),
        ([start(process_started=0.0)], "lost"),
        ([start(pid="x")], "lost"),
        ([start(host="elsewhere")], "running"),
        ([start(), end(0, "finished")], "finished"),
        ([start(), end(143, "stopped")], "stopped"),
        ([start(), end(1, "failed"), start()], "running"),
        ([start(), end(1, "failed"), start(pid=1, process_started=0.0)], "lost"),
        ([start(process_started=0.0), end(1, "failed", rank=1)], "failed"),
        ([start(host="elsewhere"), end(1, "failed", rank=None)], "failed"),
        ([start(), end(1, "failed", rank=1)], "running"),
        ([start(), end(0, "no such state")], "lost"),
        ([], "lost"),
    ],
)
def test_the_state_of_a_run(tmp_path, rows, expected):
    assert state(tmp_path, *rows) == expected


def test_a_folder_without_a_record_is_lost(tmp_path):
    assert state_of(tmp_path / "none") == "lost"


def test_a_run_of_another_machine_that_wrote_nothing_for_a_day_is_lost(tmp_path):
    assert state(tmp_path, start(host="elsewhere")) == "running"
    os.utime(tmp_path / EVENTS, (1.0, 1.0))
    assert state_of(tmp_path) == "lost"


def test_a_process_that_has_ended_and_waits_for_its_parent_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    row = start(pid=child.pid, process_started=psutil.Process(child.pid).create_time())
    assert state(tmp_path, row) == "running"
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert state_of(tmp_path) == "lost"
    child.wait()
    assert state_of(tmp_path) == "lost"
