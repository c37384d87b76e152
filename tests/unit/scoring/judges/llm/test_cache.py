"""A judge's cache that cannot be used, or not any more: one warning, and the run goes on with the right answers."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from online_dpo.scoring.judges.llm import cache as judge_cache
from online_dpo.scoring.judges.llm.cache import Answer, AnswerCache
from support.endpoint import comparison, comparisons, serving
from support.llm_judges import judge_of, longer_wins

YES, NO = Answer(0.75, True, "A", 10, 1), Answer(None, False, "?", 11, 2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch, caplog):
    monkeypatch.setattr(judge_cache, "BUSY_SECONDS", 0.1)
    caplog.set_level(logging.WARNING)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == judge_cache.__name__]


def works_in_memory(cache: AnswerCache, key: str = "new") -> bool:
    cache.put(key, "m", YES)
    return cache.get(key) == YES and cache.get("other") is None


def not_a_database(path: Path) -> None:
    path.write_text("something else, and long enough to be read as a header of a database" * 20)


def of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")


def of_another_version(path: Path) -> None:
    AnswerCache(str(path)).put("old", "m", YES)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")


def of_other_columns(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT)")


def truncated(path: Path) -> None:
    cache = AnswerCache(str(path))
    for number in range(200):
        cache.put(str(number), "m", Answer(0.5, False, "x" * 500, 1, 1))
    cache._opened.close()
    path.write_bytes(path.read_bytes()[:5000])
    for beside in path.parent.glob(f"{path.name}-*"):
        beside.unlink()


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "broken", [not_a_database, of_another_program, of_another_version, of_other_columns, truncated, a_folder, a_pipe]
)
def test_a_file_that_is_no_cache_is_left_alone(tmp_path, caplog, broken):
    path = tmp_path / "cache.sqlite3"
    broken(path)
    caplog.clear()
    content = path.read_bytes() if path.is_file() else b""
    cache = AnswerCache(str(path))
    assert works_in_memory(cache) and works_in_memory(cache, "more")
    [said] = warnings(caplog)
    assert said.startswith(f"`cache`: {path}: ") and "\n" not in said and "The run goes on" in said
    assert not path.is_file() or path.read_bytes() == content


def test_a_judge_with_a_broken_cache_gives_the_same_answers(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    not_a_database(path)
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint, cache=str(path))
        assert judge.prefer(comparisons(3)) == [pytest.approx(0.1)] * 3
        assert judge.prefer(comparisons(3)) == [pytest.approx(0.1)] * 3 and len(endpoint.seen) == 6
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("path", ["/proc/no/such/cache.sqlite3", "/dev/null", "a\0b", ""])
def test_a_place_where_no_file_can_be(path, caplog):
    assert works_in_memory(AnswerCache(path))
    assert len(warnings(caplog)) == 1


def test_locked_by_another_process(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    cache = AnswerCache(str(path))
    cache.put("old", "m", YES)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert works_in_memory(cache) and cache.get("old") == YES  # what is written can still be read
    [said] = warnings(caplog)
    assert "nothing more can be written to it: database is locked" in said
    other.execute("ROLLBACK")
    other.close()


def test_a_full_disk(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    cache = AnswerCache(str(path))
    cache.put("old", "m", YES)
    pages = cache._opened.execute("PRAGMA page_count").fetchone()[0]
    cache._opened.execute(f"PRAGMA max_page_count = {pages}")
    large = Answer(0.5, False, "x" * 100_000, 1, 1)
    cache.put("large", "m", large)
    assert cache.get("large") == large and cache.get("old") == YES and works_in_memory(cache)
    [said] = warnings(caplog)
    assert "database or disk is full" in said


def test_removed_or_replaced_in_mid_run(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    removed, replaced = AnswerCache(str(path)), AnswerCache(str(tmp_path / "two.sqlite3"))
    path.unlink()
    assert works_in_memory(removed)
    os.replace(tmp_path / "two.sqlite3", tmp_path / "old.sqlite3")
    AnswerCache(str(tmp_path / "two.sqlite3"))
    assert works_in_memory(replaced)
    said = warnings(caplog)
    assert len(said) == 2 and "No such file" in said[0] and "another file has taken its place" in said[1]


def test_overwritten_in_mid_run(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    cache = AnswerCache(str(path))
    for number in range(50):
        cache.put(str(number), "m", YES)
    cache._opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"\xff" * path.stat().st_size)
    cache._opened.execute("PRAGMA cache_size = 0")
    assert {cache.get(str(number)) for number in range(50)} <= {YES, None} and works_in_memory(cache)
    assert len(warnings(caplog)) == 1


def test_entries_that_are_no_answers_are_asked_for_again(tmp_path, caplog):
    path = tmp_path / "cache.sqlite3"
    cache = AnswerCache(str(path))
    rows = {
        "text": ("yes", 0, "A", 1, 1),
        "large": (1.5, 0, "A", 1, 1),
        "negative": (-0.5, 0, "A", 1, 1),
        "infinite": (float("inf"), 0, "A", 1, 1),
        "final": (0.5, 7, "A", 1, 1),
        "blob": (0.5, 0, b"A", 1, 1),
        "tokens": (0.5, 0, "A", -5, 1),
        "float tokens": (0.5, 0, "A", 1.5, 1),
    }
    with sqlite3.connect(path) as connection:
        for key, (p_first, final, reply, *tokens) in rows.items():
            row = (key, p_first, final, reply, "m", *tokens, 0.0)
            connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    for key in rows:
        assert cache.get(key) is None
        cache.put(key, "m", NO)
        assert cache.get(key) == NO
    [said] = warnings(caplog)
    assert "it holds entries that are no answers" in said
    assert [AnswerCache(str(path)).get(key) for key in rows] == [NO] * len(rows)


def test_two_runs_share_a_file_and_the_first_answer_stays(tmp_path, caplog):
    one, two = (AnswerCache(str(tmp_path / "cache.sqlite3")) for _ in range(2))
    one.put("k", "m", YES)
    two.put("k", "m", NO)
    assert one.get("k") == two.get("k") == YES and not warnings(caplog)


def test_it_is_for_its_owner_alone(tmp_path, caplog):
    os.umask(os.umask(0o022))
    path = tmp_path / "new" / "folder" / "cache.sqlite3"
    AnswerCache(str(path)).put("k", "m", YES)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert not warnings(caplog)
    for file in path.parent.iterdir():
        file.chmod(0o644)
    assert AnswerCache(str(path)).get("k") == YES
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    [said] = warnings(caplog)
    assert said == f"`cache`: others could read {path}; now it is for its owner alone."


@pytest.mark.skipif(os.geteuid() == 0, reason="everything belongs to the superuser")
def test_another_users_file_is_not_believed(caplog):
    assert works_in_memory(AnswerCache("/etc/passwd")) and len(warnings(caplog)) == 1


def test_a_judge_without_a_cache_remembers_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(longer_wins) as endpoint:
        judge_of(endpoint).prefer([comparison("a", "bb")])
    assert not list(tmp_path.iterdir())
