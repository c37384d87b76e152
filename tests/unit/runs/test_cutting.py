"""A record that was cut anywhere by a kill is read, and cut off after any step."""

import json

import pytest

from online_dpo.runs.appending import GrowingFile
from online_dpo.runs.cutting import cut_after
from online_dpo.runs.frames import encode, frames, read
from online_dpo.runs.layout import EVENTS, METRICS, CompletionsFile, completions_files
from online_dpo.runs.reading import RunFolder

FILE = CompletionsFile(rank=0, number=0)


def frame_of(step, rank=0, groups=2):
    return encode([{"step": step, "rank": rank, "index": index, "prompt": "x" * step} for index in range(groups)])


def row_of(step, **metrics):
    return json.dumps({"step": step, "kind": "train", **metrics}).encode() + b"\n"


def fill(folder, steps, file=FILE):
    (folder / file.name).write_bytes(b"".join(frame_of(step, file.rank) for step in steps))


def steps_in(folder, file=FILE):
    return [read(folder / file.name, frame)[0]["step"] for frame in frames(folder / file.name)]


def test_frames_and_rows_of_later_steps_go(tmp_path):
    fill(tmp_path, range(1, 6))
    (tmp_path / METRICS).write_bytes(b"".join(map(row_of, range(1, 6))))
    cut = cut_after(tmp_path, 3)
    assert steps_in(tmp_path) == [1, 2, 3] and [row["step"] for row in RunFolder(tmp_path).metrics().rows] == [1, 2, 3]
    assert (cut.rows, cut.frames, cut.damaged, cut.last_logged) == (2, 2, [], 3)


def test_nothing_goes_where_nothing_is_later(tmp_path):
    fill(tmp_path, [1, 2])
    before = (tmp_path / FILE.name).read_bytes()
    cut = cut_after(tmp_path, 2)
    assert (tmp_path / FILE.name).read_bytes() == before and (cut.rows, cut.frames) == (0, 0)


def test_all_files_of_all_ranks_are_cut_also_of_those_that_are_gone(tmp_path):
    for rank in (0, 7):
        fill(tmp_path, [1, 2], CompletionsFile(rank, 0))
        fill(tmp_path, [3, 4], CompletionsFile(rank, 1))
        fill(tmp_path, [5], CompletionsFile(rank, 2))
    cut = cut_after(tmp_path, 3)
    assert completions_files(tmp_path) == [CompletionsFile(rank, n) for rank in (0, 7) for n in (0, 1)]
    assert all(steps_in(tmp_path, CompletionsFile(rank, 1)) == [3] for rank in (0, 7)) and cut.frames == 4


def test_a_file_of_later_steps_alone_goes(tmp_path):
    fill(tmp_path, [4, 5])
    cut_after(tmp_path, 3)
    assert completions_files(tmp_path) == []


def test_the_summary_of_a_run_that_goes_on_is_none_of_its_rows(tmp_path):
    (tmp_path / METRICS).write_bytes(row_of(4, loss=1.0) + row_of(4, train_runtime=2.0) + row_of(4, eval_loss=0.5))
    cut_after(tmp_path, 4)
    rows = RunFolder(tmp_path).metrics().rows
    assert [sorted(row.keys() - {"step", "kind"}) for row in rows] == [["loss"], ["eval_loss"]]


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_file_of_frames_that_ends_at_any_byte_is_read_and_cut(tmp_path, step):
    whole = [frame_of(number) for number in (1, 2, 3)]
    content = b"".join(whole)
    ends = [len(whole[0]), len(whole[0] + whole[1]), len(content)]
    for size in range(len(content) + 1):
        (tmp_path / FILE.name).write_bytes(content[:size])
        there = [number for number, end in enumerate(ends, start=1) if end <= size]
        assert steps_in(tmp_path) == there
        cut_after(tmp_path, step)
        kept = [number for number in there if number <= step]
        assert (completions_files(tmp_path) == [FILE]) == bool(kept), size
        if kept:
            assert (tmp_path / FILE.name).read_bytes() == content[: ends[len(kept) - 1]]
            with (tmp_path / FILE.name).open("ab") as file:
                file.write(frame_of(9))
            assert steps_in(tmp_path) == [*kept, 9]
        (tmp_path / FILE.name).unlink(missing_ok=True)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_file_of_rows_that_ends_at_any_byte_is_read_and_cut(tmp_path, step):
    lines = [row_of(number, text="häh") for number in (1, 2, 3)]
    content = b"".join(lines)
    for size in range(len(content) + 1):
        (tmp_path / METRICS).write_bytes(content[:size])
        there = [row["step"] for row in RunFolder(tmp_path).metrics().rows]
        assert there == list(range(1, content[:size].count(b"\n") + 1))
        cut_after(tmp_path, step)
        kept = [number for number in there if number <= step]
        assert (tmp_path / METRICS).read_bytes() == b"".join(lines[: len(kept)])


@pytest.mark.parametrize("place", ["magic", "content", "checksum"])
def test_a_damaged_frame_in_the_middle_stays_and_is_told(tmp_path, place):
    whole = [bytearray(frame_of(number)) for number in (1, 2, 3, 4)]
    at = {"magic": 0, "content": len(whole[1]) // 2, "checksum": len(whole[1]) - 1}[place]
    whole[1][at] ^= 0xFF
    (tmp_path / FILE.name).write_bytes(b"".join(whole))
    cut = cut_after(tmp_path, 3)
    assert (tmp_path / FILE.name).read_bytes() == b"".join(whole[:3]) and cut.frames == 1
    assert place == "checksum" or place == "content" or cut.damaged == [FILE.name]
    cut_after(tmp_path, 2)
    assert (tmp_path / FILE.name).read_bytes() == b"".join(whole[:2])


def test_a_damaged_row_in_the_middle_stays_and_is_told(tmp_path):
    content = row_of(1) + b"\0\0\0{\n" + row_of(2) + row_of(3)
    (tmp_path / METRICS).write_bytes(content)
    cut = cut_after(tmp_path, 2)
    assert cut.damaged == [METRICS] and (tmp_path / METRICS).read_bytes() == row_of(1) + b"\0\0\0{\n" + row_of(2)


@pytest.mark.parametrize("size", [0, 1, 30, 40, 45, 46, 47, 70, 90])
def test_events_that_end_at_any_byte_lose_the_torn_one_alone(tmp_path, size):
    content = row_of(1, message="first") + row_of(9, message="later")
    (tmp_path / EVENTS).write_bytes(content[:size])
    cut_after(tmp_path, 1)
    file = GrowingFile(tmp_path / EVENTS, shared=True)
    file.add(row_of(2, message="next"))
    told = [row["message"] for row in RunFolder(tmp_path).events().rows]
    assert told == ["first", "later"][: content[:size].count(b"\n")] + ["next"]
