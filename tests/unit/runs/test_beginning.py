"""What happens to the files in a folder before a run writes its record there."""

import os

import pytest

from online_dpo.runs.beginning import ForeignFileError, begin_anew, check_own, go_on
from online_dpo.runs.layout import EARLIER, ENVIRONMENT, EVENTS, METRICS, VOTES, CompletionsFile
from online_dpo.runs.written import SESSIONS, add_session, is_ours, sessions_in, write_settings

ROWS = {
    METRICS: '{"step": 1, "kind": "train", "time": 1.0, "loss": 0.5}\n',
    EVENTS: '{"time": 1.0, "step": 0, "rank": 0, "kind": "start", "message": ""}\n',
    ENVIRONMENT: '{"sessions": []}\n',
    VOTES: "{}\n",
    CompletionsFile(0, 0).name: "x",
    CompletionsFile(3, 12).name: "y",
}


def fill(folder):
    for name, text in ROWS.items():
        (folder / name).write_text(text)


def test_a_folder_without_a_record_stays_as_it_is(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert begin_anew(tmp_path) is None and os.listdir(tmp_path) == ["model.safetensors"]


def test_each_earlier_record_has_a_folder_of_its_own(tmp_path):
    for number in (1, 2, 3):
        fill(tmp_path)
        (tmp_path / "model.safetensors").touch()
        assert begin_anew(tmp_path) == number
        assert {path.name: path.read_text() for path in (tmp_path / EARLIER / str(number)).iterdir()} == ROWS
    assert sorted(os.listdir(tmp_path)) == [EARLIER, "model.safetensors"]


@pytest.mark.parametrize("moved", range(len(ROWS) + 1))
def test_one_that_was_killed_while_it_moved_files_is_ended(tmp_path, moved):
    """A record is never split between two folders."""
    fill(tmp_path)
    (tmp_path / EARLIER / ".moving").mkdir(parents=True)
    for name in list(ROWS)[:moved]:
        os.rename(tmp_path / name, tmp_path / EARLIER / ".moving" / name)
    assert begin_anew(tmp_path) == 1
    assert {path.name for path in (tmp_path / EARLIER / "1").iterdir()} == set(ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (METRICS, "step,loss\n1,0.5\n"),
        (METRICS, '{"accuracy": 1}\n'),
        (EVENTS, '{"event": "click"}\n'),
        (EVENTS, "[1]\n"),
        (ENVIRONMENT, '{"PATH": "/bin"}'),
    ],
)
def test_a_file_of_another_program_is_not_touched(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for prepare in (begin_anew, lambda folder: go_on(folder, 3)):
        with pytest.raises(ForeignFileError, match=f"{name} is not of a run's record"):
            prepare(tmp_path)
    assert (tmp_path / name).read_text() == text and os.listdir(tmp_path) == [name]


def test_a_folder_or_a_link_of_that_name_is_not_touched(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(ForeignFileError):
        check_own(tmp_path)
    (tmp_path / METRICS).rmdir()
    (tmp_path / METRICS).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ForeignFileError):
        check_own(tmp_path)


@pytest.mark.parametrize("text", ["", '{"step": 1, "ti', "\n", '{"step": 1, "kind": "train", "time": null}'])
def test_a_file_that_is_empty_or_torn_is_ours(tmp_path, text):
    (tmp_path / METRICS).write_text(text)
    check_own(tmp_path)


def test_settings_are_written_over_ours_and_beside_a_users(tmp_path):
    assert write_settings(tmp_path, "beta: 0.1\n", "1.0") == tmp_path / "run.yaml"
    assert write_settings(tmp_path, "beta: 0.2\n", "1.0") == tmp_path / "run.yaml" and is_ours(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("beta: 0.3\n")
    assert write_settings(tmp_path, "beta: 0.2\n", "1.0") == tmp_path / "run.resolved.yaml"
    assert (tmp_path / "run.yaml").read_text() == "beta: 0.3\n"
    (tmp_path / "run.resolved.yaml").write_text("mine")
    assert write_settings(tmp_path, "beta: 0.2\n", "1.0") is None
    assert (tmp_path / "run.resolved.yaml").read_text() == "mine"


def test_settings_are_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "run.yaml").symlink_to(tmp_path / "elsewhere")
    assert write_settings(tmp_path, "beta: 0.2\n", "1.0") == tmp_path / "run.resolved.yaml"
    assert (tmp_path / "elsewhere").read_text() == ""


@pytest.mark.parametrize("before", [None, "{", "[]", '{"sessions": 3}'])
def test_sessions_are_added(tmp_path, before):
    if before is not None:
        (tmp_path / ENVIRONMENT).write_text(before)
    add_session(tmp_path, {"python": "3.11"})
    add_session(tmp_path, {"python": "3.12", "device": object})
    assert [session["python"] for session in sessions_in(tmp_path / ENVIRONMENT)] == ["3.11", "3.12"]
    assert SESSIONS in (tmp_path / ENVIRONMENT).read_text()
