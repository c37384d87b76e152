"""What the command that starts processes tells of is an event of the run, once processes train."""

import pytest

from online_dpo.launch.logs import Logs
from online_dpo.runs.directory import json_line
from online_dpo.runs.endings import End
from online_dpo.runs.layout import EVENTS
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.state import state_of

START = {"time": 1.0, "step": 3, "rank": 0, "kind": "start", "message": "", "host": "elsewhere", "pid": 1}


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / EVENTS).write_bytes(json_line(START))
    return Logs(tmp_path / "ray")


def events_of(logs):
    return [event for event in RunFolder(logs.folder.parent).events().rows if event["kind"] != "start"]


def test_before_processes_train_nothing_is_written(logs, capsys):
    logs.tell("server 0 is ready", "server")
    assert events_of(logs) == [] and "ray: server 0 is ready" in capsys.readouterr().err


def test_events_have_no_rank_and_the_last_step(logs):
    logs.tells_record = True
    logs.tell("server 0 was killed by SIGKILL. It is started again (1 of 3)", "server")
    logs.tell("a line that is no event")
    [event] = events_of(logs)
    assert (event["kind"], event["rank"], event["step"]) == ("server", None, 3)


def test_a_run_without_a_record_gets_none(logs):
    (logs.folder.parent / EVENTS).unlink()
    logs.tells_record = True
    logs.tell("server 0 is ready", "server")
    assert not (logs.folder.parent / EVENTS).exists()


def test_the_end_is_told_where_no_process_could(logs):
    logs.tells_record = True
    logs.end(End(1, "two machines are lost"))
    logs.end(End(1, "again"))
    [end] = events_of(logs)
    assert (end["code"], end["state"], end["message"]) == (1, "failed", "two machines are lost")
    assert state_of(logs.folder.parent) == "failed"
