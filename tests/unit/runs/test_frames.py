"""Frames: found one by one, read back as written, and torn ends left out."""

import random

import pytest

from online_dpo.runs import frames


def steps(count, seed=0):
    rng, letters = random.Random(seed), "ab é\n\u2028😀"
    lengths = [0, 3, 5000, 200_000]
    return [
        [{"step": step, "text": "".join(rng.choices(letters, k=rng.choice(lengths)))} for _ in range(2)]
        for step in range(count)
    ]


def test_frames_are_found_and_read_one_by_one(tmp_path):
    written, file = steps(12), tmp_path / "frames.zst"
    file.write_bytes(b"".join(frames.encode(rows) for rows in written))
    found = list(frames.frames(file))
    assert [frames.read(file, frame) for frame in found] == written
    assert found[0].start == 0 and found[-1].end == file.stat().st_size
    assert list(frames.frames(file, found[4].end)) == found[5:]


def test_incompressible_repeated_and_empty_content_is_framed_as_well(tmp_path):
    file = tmp_path / "frames.zst"
    written = [[{"noise": random.Random(1).randbytes(300_000).hex()}], [{"same": "a" * 1_000_000}], []]
    file.write_bytes(b"".join(map(frames.encode, written)))
    assert [frames.read(file, frame) for frame in frames.frames(file)] == written


def test_a_file_that_is_cut_at_any_byte_has_the_steps_that_are_whole(tmp_path):
    pieces = [frames.encode([{"step": step, "text": "word " * step}]) for step in range(4)]
    whole, file = b"".join(pieces), tmp_path / "frames.zst"
    ends = [sum(map(len, pieces[: n + 1])) for n in range(4)]
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        assert [frame.end for frame in frames.frames(file)] == [end for end in ends if end <= length]


def test_what_is_no_frame_ends_the_file(tmp_path):
    file = tmp_path / "frames.zst"
    first = frames.encode([{"step": 1}])
    file.write_bytes(first + b"no frame at all, but longer than a header" + first)
    assert [frame.end for frame in frames.frames(file)] == [len(first)]


def test_damaged_and_huge_frames_are_refused():
    frame = bytearray(frames.encode([{"text": "word " * 100}]))
    frame[-6] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        frames.decode(bytes(frame))
    huge = bytes.fromhex("28b52ffde0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("010000")
    with pytest.raises(ValueError, match="at most"):
        frames.decode(huge)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError):
        frames.encode([{"score": float("nan")}])


def test_half_a_surrogate_pair_does_not_end_a_run():
    assert frames.decode(frames.encode([{"text": "a\ud800b"}])) == [{"text": "a?b"}]


def test_groups_are_read_one_by_one_and_a_row_that_is_none_is_left_out(tmp_path, monkeypatch):
    file, written = tmp_path / "frames.zst", steps(6)
    long = [{"step": 7, "text": "x" * 5000}, {"step": 8}]
    file.write_bytes(b"".join(map(frames.encode, [*written, long])))
    found = list(frames.frames(file))
    assert [list(frames.each(file, frame)) for frame in found] == [*written, long]
    monkeypatch.setattr(frames, "LONGEST_LINE", 1000)
    assert list(frames.each(file, found[-1])) == [None, {"step": 8}]
    damaged = bytearray(file.read_bytes())
    damaged[found[-1].end - 6] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        list(frames.each(file, found[-1]))
