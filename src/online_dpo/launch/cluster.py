"""The calls of Ray: joining a cluster, reserving what the processes need, and workers that may be lost.

Only this module imports Ray, and only the command `online-dpo ray` imports this module.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from online_dpo.distributed.signals import STOP_SIGNALS
from online_dpo.errors import error_text
from online_dpo.launch.bundles import Bundle, shortfall
from online_dpo.launch.child import Report
from online_dpo.launch.failures import ClusterError, WorkerLost
from online_dpo.launch.settings import RaySettings
from online_dpo.launch.worker import Facts, Worker

TICK = 0.2
NOTICE_SECONDS = 5.0
CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0
"""How long a worker may take to start a process, or to send it a signal."""
REPORT_SECONDS = 120.0
"""How long a worker may be silent. Ray finds out that a machine is gone earlier than that."""


class RemoteWorker:
    """A worker in its place on the cluster. Every method raises `WorkerLost` where its machine or process is gone."""

    def __init__(self, actor: Any, paths: Sequence[str]) -> None:
        self._actor = actor
        self._facts_asked = actor.facts.remote(list(paths))
        self._asked: Any = None
        self._since = 0.0
        self._left: list[tuple[int, str]] = []

    def facts(self) -> Facts | None:
        """The facts of its machine; ``None`` while it is not there yet."""
        return self._get(self._facts_asked, 0.0)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of `Worker` and waits for its result."""
        return self._wait(getattr(self._actor, method).remote(*arguments), CALL_SECONDS)

    def start(self, *arguments: Any) -> None:
        """Starts the process (`Worker.start`). What an earlier one has printed stands in the next report."""
        if self._asked is not None:
            self._left += self._wait(self._asked, CALL_SECONDS).lines
            self._asked = None
        self.call("start", *arguments)

    def report(self) -> Report | None:
        """The next report of its process; ``None`` if it has not come yet."""
        if self._asked is None:
            self._asked, self._since = self._actor.report.remote(), time.monotonic()
        report = self._get(self._asked, 0.0)
        if report is not None:
            self._asked, left, self._left = None, self._left, []
            return replace(report, lines=left + report.lines)
        if time.monotonic() - self._since > REPORT_SECONDS:
            raise WorkerLost(f"it has not answered for {REPORT_SECONDS:g} seconds")
        return report

    def discard(self) -> None:
        """Ends the worker, and with it its process."""
        ray.kill(self._actor)

    def _wait(self, asked: Any, seconds: float) -> Any:
        ready, _ = ray.wait([asked], timeout=seconds)
        if not ready:
            raise WorkerLost(f"it has not answered for {seconds:g} seconds")
        return self._get(asked, 0.0)

    def _get(self, asked: Any, seconds: float) -> Any:
        try:
            return ray.get(asked, timeout=seconds)
        except GetTimeoutError:
            return None
        except RayTaskError as error:
            raise ClusterError(f"A process on the cluster could not be started: {error_text(error.cause)}") from error
        except RayError as error:
            if "creation task" in str(error):  # the package cannot be imported there
                cause = str(error).strip().rpartition("\n")[2]
                raise ClusterError(
                    f"A process on the cluster could not be started: {cause}. Install the same online-dpo on all "
                    "machines."
                ) from error
            raise WorkerLost(error_text(error, first_line=True)) from error


class Cluster:
    """A cluster with room for the processes of a run, each in its bundle."""

    def __init__(self, settings: RaySettings, bundles: Sequence[Bundle], tell: Callable[[str], None]) -> None:
        self.settings, self.bundles, self._tell = settings, bundles, tell
        self._group: PlacementGroup | None = None

    def place(self, check: Callable[[], None]) -> None:
        """Reserves the bundles; ``check`` is called while it waits, and may raise.

        Raises:
            ClusterError: there is no room for them in time. The message says what is missing.
        """
        resources = [bundle.resources for bundle in self.bundles]
        self._group = placement_group(resources, strategy="PACK")
        began, told = time.monotonic(), False
        # not `ready()`: that is a task, which waits for a process of Ray's to start
        while not self._group.wait(1):
            check()
            waited = time.monotonic() - began
            if waited > self.settings.placement_timeout:
                raise ClusterError(self.no_room())
            if waited > NOTICE_SECONDS and not told:
                told = True
                self._tell(
                    f"waiting up to {self.settings.placement_timeout:g} seconds for the cluster to have room. "
                    f"{self._shortfall()}"
                )

    def no_room(self, placed: Sequence[Bundle] = ()) -> str:
        """The message where processes have no place within the time limit, but for those that are placed."""
        return (
            f"The cluster has had no room for this run for {self.settings.placement_timeout:g} seconds "
            f"(`ray.placement_timeout`). {self._shortfall(placed)} Join more machines to it, or ask for less in `ray`."
        )

    def worker(self, index: int, paths: Sequence[str]) -> RemoteWorker:
        """Starts a worker in a bundle. It says whether it sees the paths."""
        assert self._group is not None
        bundle, place = self.bundles[index], PlacementGroupSchedulingStrategy(self._group, index)
        actor = ray.remote(Worker).options(
            num_cpus=bundle.cpus, num_gpus=bundle.gpus, scheduling_strategy=place, max_restarts=0
        )
        return RemoteWorker(actor.remote(), paths)

    def close(self) -> None:
        """Gives the bundles back, which ends what is left of the workers."""
        if self._group is not None:
            remove_placement_group(self._group)

    def _shortfall(self, placed: Sequence[Bundle] = ()) -> str:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return shortfall(self.bundles, nodes, ray.available_resources(), placed)


@contextmanager
def joined(settings: RaySettings) -> Iterator[None]:
    """Inside, this process belongs to the cluster.

    Raises:
        ClusterError: there is no cluster at this address.
    """
    where = settings.address or os.environ.get("RAY_ADDRESS")
    _check_that_it_listens(where)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (RayError, ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
        raise _not_joined(where or "this machine", error) from error
    finally:
        for number, handler in handlers.items():  # Ray has one for SIGTERM
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_it_listens(address: str | None) -> None:
    """Ray itself tries an address for minutes where nothing listens."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _not_joined(f"{host}:{port}", error) from error


def _not_joined(where: str, error: BaseException) -> ClusterError:
    cause = error_text(error, first_line=True).rstrip(".")
    return ClusterError(
        f"No Ray cluster could be joined at {where}: {cause}. Start one with `ray start --head`, or correct "
        "`ray.address` (or the variable RAY_ADDRESS)."
    )
