"""A short soak: nothing but caches grows (`make soak` is the long one)."""

import pytest

from support.processes import run_python


@pytest.mark.slow
def test_memory_threads_files_and_processes_stay_as_they_are():
    """In so few steps memory still grows by what is made once; what is kept in each step would be more."""
    done = run_python("-m", "faults.soak", "--steps", 240, "--most-growth", 80_000)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("threads") == 2 and "Nothing grew beyond its limit." in done.stdout
