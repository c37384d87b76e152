"""A process that a worker starts: what it prints, how it ends, and that it never outlives the worker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from online_dpo.launch.child import Child
from support.processes import environment
from support.ray_clusters import children_of


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(child, seconds=20.0):
    """The lines and the exit code of a child."""
    lines, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        report = child.report()
        lines += report.lines
        if report.code is not None:
            return lines, report.code
        time.sleep(0.02)
    raise AssertionError("it has not ended")


def wait_until(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_lines_come_with_their_stream_and_the_exit_code_at_the_end(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['X']); print('no', file=sys.stderr); sys.exit(3)"
    lines, ended_with = ended(Child(["-c", code], {"X": "5"}, str(tmp_path)))
    assert sorted(lines) == [(1, f"{tmp_path} 5"), (2, "no")]
    assert ended_with == 3


def test_signals_reach_the_process_also_those_that_ray_blocks(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        code = "import signal, sys, time\nfor n in (2, 15): signal.signal(n, lambda n, f: sys.exit(100 + n))\n"
        child = Child(["-u", "-c", f"{code}print('ready')\ntime.sleep(60)"], os.environ, str(tmp_path))
        wait_until(lambda child=child: child.report().lines)
        child.send(number)
        assert ended(child)[1] == 100 + number


def test_a_killed_process_is_told_as_killed_and_what_it_started_ends(tmp_path):
    code = "import subprocess, sys, os\nother = subprocess.Popen(['sleep', '60'])\nprint(os.getpid(), other.pid)\n"
    child = Child(["-u", "-c", f"{code}other.wait()"], os.environ, str(tmp_path))
    lines = []
    wait_until(lambda: lines.extend(child.report().lines) or lines)
    pid, other = map(int, lines[0][1].split())
    os.kill(pid, signal.SIGKILL)
    assert ended(child)[1] == -signal.SIGKILL
    wait_until(lambda: not is_running(other))


@pytest.mark.parametrize("victim", ["worker", "keeper"])
def test_nothing_outlives_the_worker_or_the_keeper(victim, tmp_path):
    code = (
        "import os, time\nfrom online_dpo.launch.child import Child\n"
        f"child = Child(['-c', 'import time; time.sleep(60)'], os.environ, {str(tmp_path)!r})\n"
        "print('started', flush=True)\ntime.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    worker.stdout.readline()
    [keeper] = children_of(worker.pid)
    wait_until(lambda: children_of(keeper))
    [process] = children_of(keeper)
    os.kill(worker.pid if victim == "worker" else keeper, signal.SIGKILL)
    wait_until(lambda: not is_running(process))
    wait_until(lambda: not is_running(keeper))
    worker.kill()
    worker.wait()


def test_lines_that_nobody_takes_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.launch.child.LINES", 10)
    child = Child(["-c", "for i in range(100): print(i)"], os.environ, str(tmp_path))
    child._process.wait()
    lines, _ = ended(child)
    assert lines[0] == (2, "... 90 lines are not shown") and lines[-1] == (1, "99")
