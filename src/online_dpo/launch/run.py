"""`ClusterRun`: a run on a cluster from its first process to its last, and what it does when one of them is lost."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from online_dpo.distributed.signals import StoppedBySignal, handling, name_of, write_now
from online_dpo.launch.bundles import bundles_of
from online_dpo.launch.cluster import TICK, Cluster, joined
from online_dpo.launch.endings import run_code
from online_dpo.launch.failures import ClusterError, MachinesLostError, ServerFailedError, WorkerLost
from online_dpo.launch.job import Job, OwnCheckpoints
from online_dpo.launch.logs import FOLDER, Logs, rank_name
from online_dpo.launch.servers import Server
from online_dpo.launch.trainers import Trainers
from online_dpo.runs.endings import End

SERVERS_SECONDS = 10.0
"""How long servers may take to end."""


class StopSignal:
    """The signals that the command has received: the first lets the run save a checkpoint, a second Ctrl-C does not."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.insists = False

    def receive(self, number: signal.Signals) -> None:
        """Handle a signal."""
        if self.number is None:
            self.number = number
            write_now(f"\nray: {name_of(number)}: stopping all processes. Press Ctrl-C again to kill them at once.\n")
        elif number is signal.SIGINT:
            self.insists = True

    def check(self) -> None:
        """While nothing trains, a signal ends the command.

        Raises:
            StoppedBySignal: there was one.
        """
        if self.number is not None:
            raise StoppedBySignal(self.number)


def run_on_cluster(job: Job) -> int:
    """Start a job on its cluster, and return the exit code: 0, 1, 2, 3 or 128 plus a signal's number.

    Raises:
        ClusterError, ServerFailedError: it could not be started.
        ServerFailedError, MachinesLostError: too much of it was lost.
        StoppedBySignal: a signal came before anything trained.
    """
    stop = StopSignal()
    with handling(stop.receive), joined(job.settings), _folder(job) as (logs, marker):
        run = ClusterRun(job, logs, marker, stop)
        end = End(1, "The command that started the processes failed.")
        try:
            code = run.run()
            end = End(code, f"The command that started the processes ended with exit code {code}.")
            return code
        except (ClusterError, ServerFailedError, MachinesLostError, StoppedBySignal) as error:
            number = error.signal if isinstance(error, StoppedBySignal) else None
            end = End(1 if number is None else 128 + number, str(error))
            raise
        finally:
            run.close()
            logs.end(end)


@contextmanager
def _folder(job: Job) -> Iterator[tuple[Logs, Path]]:
    """The logs, and a file that only machines see which share this folder."""
    folder = job.output_dir.absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{uuid.uuid4().hex}"
    marker.touch()
    logs = Logs(folder)
    try:
        yield logs, marker
    finally:
        logs.close()
        marker.unlink(missing_ok=True)


class ClusterRun:
    """The processes of one run, and the restarts of those that were lost."""

    def __init__(self, job: Job, logs: Logs, marker: Path, stop: StopSignal) -> None:
        self._job, self._logs, self._stop = job, logs, stop
        self._cluster = Cluster(job.settings, bundles_of(job.settings), logs.tell)
        self._trainers = Trainers(self._cluster, job, logs, marker)
        first = job.settings.trainers
        self._servers = [Server(n, first + n, self._cluster, job, logs) for n in range(job.settings.servers)]
        self._checkpoints = OwnCheckpoints(job)
        self._server_lost = False
        self._deadline: float | None = None

    def run(self) -> int:
        """Runs to the end, and returns the exit code.

        Raises:
            ClusterError, ServerFailedError, MachinesLostError, StoppedBySignal: as `run_on_cluster`.
        """
        self._cluster.place(self._stop.check)
        if count := len(self._servers):
            self._logs.tell(
                f"starting {count} vLLM {'servers' if count > 1 else 'server'}; logs are in {self._logs.folder}"
            )
        self._wait_for_servers()
        try:
            return self._train()
        except ClusterError as error:
            if not self._trainers.have_started:
                raise
            raise MachinesLostError(str(error)) from error

    def _train(self) -> int:
        """Train, again where processes were lost, and return the exit code."""
        restarts = 0
        while True:
            checkpoint = self._checkpoints.newest() if restarts else None
            code = self._attempt(checkpoint)
            if code is not None:
                return code
            why, most = self._trainers.first_end, self._job.settings.max_restarts
            if restarts >= most:
                self._logs.tell(f"{why}. The run was started again {most} times before (`ray.max_restarts`)", "failure")
                return 1
            restarts += 1
            newest = self._checkpoints.newest()
            place = "the beginning: there is no checkpoint yet" if newest is None else newest.name
            self._logs.tell(f"{why}. All ranks are started again ({restarts} of {most}), from {place}", "failure")

    @property
    def _urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def close(self) -> None:
        """Ends all processes, and gives their places back."""
        self._trainers.kill()
        for server in self._servers:
            server.end(signal.SIGTERM)
        until = time.monotonic() + SERVERS_SECONDS
        while not all(server.is_over() for server in self._servers) and time.monotonic() < until:
            time.sleep(TICK)
        for server in self._servers:
            server.close()
        self._trainers.close()
        self._cluster.close()

    def _wait_for_servers(self) -> None:
        """Wait until all servers are ready, before the processes start that sample from them."""
        while self._servers:
            for server in self._servers:
                server.tick()
            if all(server.is_ready for server in self._servers):
                return
            self._stop.check()
            time.sleep(TICK)

    def _attempt(self, checkpoint: Path | None) -> int | None:
        """Train until all ranks have ended; returns the exit code, or ``None`` if they are to be started again."""
        self._deadline, self._server_lost = None, False
        try:
            self._wait_for_servers()
            self._trainers.start(self._urls, checkpoint, self._stop.check)
            self._logs.tells_record = True
        except WorkerLost as lost:
            self._trainers.first_end = self._trainers.first_end or f"a worker is lost: {lost}"
            self._trainers.kill()
            return None
        while not self._trainers.are_over:
            self._trainers.tick()
            if self._servers and self._must_move():
                return None
            self._end_in_time()
            time.sleep(TICK)
        if self._stop.number is not None and any(self._trainers.codes.values()):
            return 128 + self._stop.number
        by_themselves = {rank: code for rank, code in self._trainers.codes.items() if rank not in self._trainers.killed}
        return run_code(by_themselves, server_lost=self._server_lost)

    def _must_move(self) -> bool:
        """Look after the servers. Whether one has another address now, which those who train do not know."""
        try:
            for server in self._servers:
                server.tick()
        except (ServerFailedError, ClusterError):
            self._let_trainers_end()
            raise
        ready = all(server.is_ready for server in self._servers)
        self._server_lost |= not ready
        if not ready or self._trainers.urls == self._urls or self._stop.number is not None:
            return False
        self._trainers.first_end = "a server has another address now"
        self._trainers.kill()
        return True

    def _let_trainers_end(self) -> None:
        """Let them save a checkpoint, where there is nothing any more to sample from."""
        self._trainers.send(signal.SIGTERM)
        until = time.monotonic() + self._job.settings.stop_timeout
        while not self._trainers.are_over and time.monotonic() < until and not self._stop.insists:
            self._trainers.tick()
            time.sleep(TICK)

    def _end_in_time(self) -> None:
        """Pass a signal on; once an end has begun, kill those who do not come to it in time."""
        now, settings = time.monotonic(), self._job.settings
        if self._deadline is None and self._stop.number is not None:
            self._deadline = now + settings.stop_timeout
            self._trainers.send(signal.SIGTERM)
        elif self._deadline is None and any(self._trainers.codes.values()):  # not while rank 0 saves the model
            self._deadline = now + settings.stop_timeout
        if self._deadline is not None and (now > self._deadline or self._stop.insists):
            late = [rank for rank in range(settings.trainers) if rank not in self._trainers.codes]
            if late and not self._trainers.killed:
                self._logs.tell(f"{', '.join(map(rank_name, late))} did not end in time: killed")
            self._trainers.kill()
