"""Standard streams that break: writing never fails, the first failure is told, a lost result is an error."""

from __future__ import annotations

import io
import os
import sys

import pytest

from online_dpo.cli.main import main
from online_dpo.cli.terminal.streams import Streams, SturdyStream, sturdy_streams


class Recording(io.StringIO):
    """Keeps its text, and can be told to fail."""

    error: OSError | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


def test_a_pipe_that_is_closed_is_told_once_on_the_other_stream() -> None:
    out, err = Recording(), Recording()
    streams = Streams(out, err)
    streams.tell_failures()
    streams.stdout.write("step 1\n")
    out.error = BrokenPipeError(32, "Broken pipe")
    for _ in range(3):
        streams.stdout.write("step 2\n")
    assert out.getvalue() == "step 1\n"
    assert err.getvalue() == "warning: standard output cannot be written (Broken pipe); the run goes on without it.\n"
    assert not streams.stdout.isatty()


def test_what_standard_error_cannot_take_goes_to_standard_output() -> None:
    out, (read, written) = Recording(), os.pipe()
    os.close(read)
    streams = Streams(out, os.fdopen(written, "w"))  # buffered: it fails when it is flushed
    streams.tell_failures()
    print("error: no model", file=streams.stderr)
    print("Before that: a checkpoint", file=streams.stderr)
    told = "warning: standard error cannot be written (Broken pipe); the run goes on without it.\n"
    assert out.getvalue() == f"{told}error: no model\nBefore that: a checkpoint\n"


def test_after_a_full_disk_writes_are_tried_again() -> None:
    out, told = Recording(), []
    stream = SturdyStream(out, "standard output", told.append)
    out.error = OSError(28, "No space left on device")
    stream.write("lost\n")
    out.error = None
    stream.write("there\n")
    assert out.getvalue() == "there\n" and told == ["standard output cannot be written (No space left on device)"]


def test_a_stream_that_was_closed_at_the_start_or_is_closed_by_other_code() -> None:
    err = Recording()
    Streams(None, err).tell_failures()
    assert "standard output cannot be written (it is closed)" in err.getvalue()
    closed = io.StringIO()
    closed.close()
    stream = SturdyStream(closed, "standard error")
    assert stream.write("x") == 1 and stream.failure is not None
    open_one = SturdyStream(out := io.StringIO(), "standard output")
    open_one.close()
    open_one.write("still there")
    assert out.getvalue() == "still there"


@pytest.mark.parametrize("text", ["caf\u00e9 \u2713", "half \ud83d"])
def test_a_character_that_the_encoding_does_not_have_is_escaped(text: str) -> None:
    raw = io.BytesIO()
    stream = SturdyStream(io.TextIOWrapper(raw, encoding="ascii"), "standard output")
    stream.write(text)
    stream.flush()
    assert raw.getvalue() == text.encode("ascii", "backslashreplace") and stream.failure is None


def test_the_streams_come_back_and_a_full_disk_is_not_tried_again_at_exit() -> None:
    before = sys.stdout, sys.stderr
    with open("/dev/full", "w") as full:
        sys.stdout = full
        try:
            with sturdy_streams() as streams:
                print("x" * 10)
            assert sys.stdout is full
        finally:
            sys.stdout = before[0]
        assert streams.stdout.failure is not None
        full.flush()  # as Python does at exit; it would end with exit code 120
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("words", [["schema"], ["--help"], ["train", "--help"], ["--version"]])
def test_a_result_that_cannot_be_written_is_an_error(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 1
    assert capsys.readouterr().err == "error: the output could not be written: No space left on device.\n"


def test_a_reader_of_help_that_has_seen_enough_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["train", "--help"]) == 0
    assert capsys.readouterr().err == ""
