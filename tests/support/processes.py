"""Processes that tests start: they find the package that is tested and the tests' helpers, wherever they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import online_dpo

PATHS = (str(Path(online_dpo.__file__).parents[1]), str(Path(__file__).parents[1]))


def environment(**changes: str) -> dict[str, str]:
    """This process's variables with ``changes``, and with `PATHS` first in ``PYTHONPATH``."""
    paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | changes


def run_python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with these words, in an `environment`; ``options`` are those of `subprocess.run`."""
    options = {"env": environment(), "timeout": 300, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *map(str, words)], **options)


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return any_socket.getsockname()[1]
