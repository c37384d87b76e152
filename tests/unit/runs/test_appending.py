"""Pieces are written whole, wait while that is not possible, and come in their order."""

import errno
import os
import resource
import shutil
import signal

import pytest

from online_dpo.runs import appending
from online_dpo.runs.appending import GrowingFile


@pytest.fixture
def limited():
    """A function that lets no file of this process grow beyond a number of bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_piece_that_does_not_fit_leaves_nothing_and_is_written_later(tmp_path, limited):
    file = GrowingFile(tmp_path / "rows")
    file.add(b"one\n")
    limited(6)
    for piece in (b"two\n", b"three\n"):
        with pytest.raises(OSError):
            file.add(piece)
    assert len(file.backlog) == 2
    limited(0)
    file.add(b"four\n")
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\nthree\nfour\n" and not file.backlog


def test_what_is_torn_in_a_shared_file_becomes_a_line_of_its_own(tmp_path, limited):
    """Another process may have written after it, so that nothing can be cut off."""
    file, other = GrowingFile(tmp_path / "rows", shared=True), GrowingFile(tmp_path / "rows", shared=True)
    limited(2)
    with pytest.raises(OSError):
        file.add(b"one\n")
    limited(0)
    other.add(b"two\n")
    file.flush()
    assert (tmp_path / "rows").read_bytes() == b"ontwo\n\none\n"


def test_a_file_that_somebody_removes_is_begun_again(tmp_path):
    file = GrowingFile(tmp_path / "run" / "rows") if (tmp_path / "run").mkdir() is None else None
    file.add(b"one\n")
    (tmp_path / "run" / "rows").unlink()
    (tmp_path / "run").rmdir()
    file.add(b"two\n")
    assert (tmp_path / "run" / "rows").read_bytes() == b"two\n"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("of another program")
    (tmp_path / "rows").symlink_to(tmp_path / "other")
    with pytest.raises(OSError) as raised:
        GrowingFile(tmp_path / "rows")
    assert raised.value.errno == errno.ELOOP and (tmp_path / "other").read_text() == "of another program"


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rows")
    reader = os.open(tmp_path / "rows", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="no file"):
        GrowingFile(tmp_path / "rows")
    os.close(reader)


def test_too_much_that_waits_is_dropped_from_the_oldest_on(tmp_path, limited, monkeypatch):
    monkeypatch.setattr(appending, "LARGEST_BACKLOG", 10)
    file = GrowingFile(tmp_path / "rows")
    limited(1)
    for piece in (b"first\n", b"second\n", b"third\n"):
        with pytest.raises(OSError):
            file.add(piece)
    limited(0)
    file.flush()
    assert (tmp_path / "rows").read_bytes() == b"third\n" and file.dropped == 2


def test_another_writer_begins_a_line_after_one_that_was_torn(tmp_path):
    (tmp_path / "rows").write_bytes(b"one\nto")
    GrowingFile(tmp_path / "rows", shared=True).add(b"three\n")
    assert (tmp_path / "rows").read_bytes() == b"one\nto\nthree\n"


def test_while_a_removed_file_cannot_be_begun_again_pieces_wait_and_go_nowhere_else(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    file = GrowingFile(folder / "rows")
    file.add(b"one\n")
    shutil.rmtree(folder)
    folder.touch()  # so that no folder can be made there
    with pytest.raises(OSError):
        file.add(b"two\n")
    with (tmp_path / "other").open("wb"), pytest.raises(OSError):  # it may get a descriptor that has been closed
        file.add(b"three\n")
    folder.unlink()
    file.flush()
    assert (folder / "rows").read_bytes() == b"two\nthree\n" and (tmp_path / "other").read_bytes() == b""
