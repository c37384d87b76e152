"""`Worker`: what runs on a machine of the cluster, in a process of Ray, and starts one process of the run there."""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from online_dpo import __version__
from online_dpo.launch.child import Child, Report
from online_dpo.launch.environment import of_process

STARTING_SECONDS, HEALTH_SECONDS = 0.5, 10.0
ANSWER_SECONDS = 10.0
PARENT_SECONDS = 1.0
SEEN_SECONDS = 5.0
"""How long a network file system may take to show a file that another machine has written."""


@dataclass(frozen=True)
class Facts:
    """What a worker says of its machine.

    >>> Facts(node="3f2a...", address="10.0.0.1", version="0.9.0", missing=["/data/prompts.jsonl"])
    """

    node: str
    address: str
    version: str
    missing: list[str]


def own_version() -> str:
    """The version of this package and of Python, here."""
    return f"{__version__} on Python {platform.python_version()}"


class Worker:
    """Starts one process of the run, and reports how it fares. Ray makes an actor of it."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._health: Health | None = None
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def facts(self, paths: Sequence[str]) -> Facts:
        """Says which machine this is, and which of these paths are not seen from it."""
        import ray

        until = time.monotonic() + SEEN_SECONDS
        while (missing := [path for path in paths if not os.path.exists(path)]) and time.monotonic() < until:
            time.sleep(0.5)
        node = ray.get_runtime_context().get_node_id()
        return Facts(node, ray.util.get_node_ip_address(), own_version(), missing)

    def free_port(self, address: str, wanted: int = 0) -> int:
        """Returns a port of this machine that nothing listens on: the wanted one if it is free."""
        for port in (wanted, 0) if wanted else (0,):
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError:
                    continue
                return probe.getsockname()[1]
        raise OSError(f"no port of {address} is free")

    def start(
        self, words: Sequence[str], passed: Mapping[str, str], own: Mapping[str, str], folder: str, health: str | None
    ) -> None:
        """Starts the process, in place of an earlier one.

        Args:
            passed: variables from where the command runs.
            own: variables of this process alone.
            health: an address that answers once the process, a server, is ready.
        """
        self.kill()
        self._child = Child(words, {**of_process(os.environ, passed), **own}, folder)
        self._health = None if health is None else Health(health)

    def report(self) -> Report:
        """Returns what the process has printed since the last call, and how it ended."""
        assert self._child is not None
        report = self._child.report()
        silent = None if self._health is None else self._health.silent_seconds
        return Report(report.lines, report.code, silent)

    def send(self, number: int) -> None:
        """Sends a signal to the process."""
        if self._child is not None:
            self._child.send(number)

    def kill(self) -> None:
        """Kills the process with all that it has started, and waits until it is gone."""
        if self._health is not None:
            self._health.close()
        if self._child is not None:
            self._child.kill()


def _end_with(parent: int) -> None:
    """End this process soon after Ray on this machine has ended: by itself it may stay, with its process, for long."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


class Health:
    """Asks a server again and again whether it is well, in a thread."""

    def __init__(self, url: str) -> None:
        self._url, self._answered = url, -1.0
        self._closed = threading.Event()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def silent_seconds(self) -> float | None:
        """Seconds since the last good answer; ``None`` before the first."""
        return None if self._answered < 0 else time.monotonic() - self._answered

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(STARTING_SECONDS if self._answered < 0 else HEALTH_SECONDS):
            try:
                with self._opener.open(self._url, timeout=ANSWER_SECONDS):
                    self._answered = time.monotonic()
            except OSError:  # it is not there yet, or an error status
                continue
