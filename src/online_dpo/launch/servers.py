"""`Server`: a vLLM server of a run, which is started, watched, and replaced where it is lost."""

from __future__ import annotations

import time
from contextlib import suppress

from online_dpo.launch.cluster import Cluster, RemoteWorker
from online_dpo.launch.commands import serve_words
from online_dpo.launch.endings import how_it_ended
from online_dpo.launch.failures import ClusterError, ServerFailedError, WorkerLost
from online_dpo.launch.job import Job
from online_dpo.launch.logs import Logs, server_name
from online_dpo.launch.worker import Facts

WRONG_INPUT = 2
"""The exit code of `online-dpo serve`, and of vLLM, where their words are wrong."""
SILENT_SECONDS = 60.0
"""How long a server may leave the question unanswered whether it is well."""


class Server:
    """One server. Call `tick` again and again: it does what is next, and never waits.

    Args:
        number: of the server.
        index: of its bundle.
    """

    def __init__(self, number: int, index: int, cluster: Cluster, job: Job, logs: Logs) -> None:
        self.number, self._index, self._cluster, self._job, self._logs = number, index, cluster, job, logs
        self.url = ""
        self.is_ready = self._was_ready = False
        self._address, self._port, self._restarts = "", 0, 0
        self._worker: RemoteWorker | None = None
        self._launched = False
        self._since = 0.0

    def tick(self) -> None:
        """Goes on with the start of the server, or looks how it fares.

        Raises:
            ClusterError: there is no room for it, or its machine cannot serve.
            ServerFailedError: it could not be started, or was lost too often.
        """
        try:
            if self._worker is None:
                self._begin()
            elif not self._launched:
                self._launch_when_placed(self._worker)
            else:
                self._look(self._worker)
        except WorkerLost as lost:
            self._worker = None
            self._replace(f"is lost: {lost}")

    def end(self, number: int) -> None:
        """Sends it a signal."""
        if self._worker is not None and self._launched:
            with suppress(WorkerLost):
                self._worker.call("send", number)

    def is_over(self) -> bool:
        """Whether no process of it runs any more."""
        if self._worker is None or not self._launched:
            return True
        try:
            report = self._worker.report()
        except WorkerLost:
            return True
        return report is not None and report.code is not None

    def close(self) -> None:
        """Kills it."""
        if self._worker is not None:
            with suppress(WorkerLost):
                self._worker.call("kill")
            self._worker.discard()

    def _begin(self) -> None:
        folders = [self._job.folder, *([self._job.model] if self._job.model.startswith("/") else [])]
        self._worker = self._cluster.worker(self._index, folders)
        self._launched, self._since = False, time.monotonic()

    def _launch_when_placed(self, worker: RemoteWorker) -> None:
        facts = worker.facts()
        if facts is not None:
            self._job.check(facts)
            self._launch(worker, facts)
        elif time.monotonic() - self._since > self._job.settings.placement_timeout:
            others = [bundle for index, bundle in enumerate(self._cluster.bundles) if index != self._index]
            raise ClusterError(self._cluster.no_room(others))

    def _launch(self, worker: RemoteWorker, facts: Facts | None = None) -> None:
        """Start the process: on the port that it had, so that those who train find it again."""
        if facts is not None and facts.address != self._address:
            self._address, self._port = facts.address, 0
        self._port = worker.call("free_port", self._address, self._port)
        host = f"[{self._address}]" if ":" in self._address else self._address
        self.url = f"http://{host}:{self._port}"
        job, settings = self._job, self._job.settings
        words = serve_words(
            job.model,
            settings,
            self._address,
            self._port,
            revision=job.revision,
            trust_remote_code=job.trust_remote_code,
        )
        own = {"VLLM_HOST_IP": self._address, **({} if settings.server_gpus else {"CUDA_VISIBLE_DEVICES": ""})}
        worker.start(words, dict(job.variables), own, job.folder, f"{self.url}/health")
        self._launched, self._since = True, time.monotonic()

    def _look(self, worker: RemoteWorker) -> None:
        report = worker.report()
        if report is None:
            return
        self._logs.of_server(self.number, report.lines)
        if report.code is not None:
            if report.code > 0 and not self._was_ready:
                raise self._failed_at_start(how_it_ended(report.code), wrong_input=report.code == WRONG_INPUT)
            self._replace(how_it_ended(report.code))
        elif report.silent_seconds is None:
            if time.monotonic() - self._since > self._job.settings.server_start_timeout:
                limit = f"{self._job.settings.server_start_timeout:g} seconds (`ray.server_start_timeout`)"
                raise self._failed_at_start(f"has not answered within {limit}")
        elif report.silent_seconds > SILENT_SECONDS:
            self._replace(f"has not answered for {SILENT_SECONDS:g} seconds")
        elif not self.is_ready:
            again = " again" if self._was_ready else ""
            self.is_ready = self._was_ready = True
            self._logs.tell(f"{server_name(self.number)} is ready{again} at {self.url}", "server")

    def _failed_at_start(self, why: str, wrong_input: bool = False) -> ServerFailedError:
        """The error where it would fail again."""
        return ServerFailedError(
            f"The vLLM {server_name(self.number)} {why} before it was ready. {self._end_of_log()}", wrong_input
        )

    def _end_of_log(self) -> str:
        name = server_name(self.number)
        return f"Its log is {self._logs.path_of(name)}, and ends with:{self._logs.end_of(name)}"

    def _replace(self, why: str) -> None:
        """Start it again: on the machine that it was on, if that is there."""
        self.is_ready = False
        name, most = server_name(self.number), self._job.settings.max_restarts
        if self._restarts >= most:
            raise ServerFailedError(
                f"The vLLM {name} {why}. It was started again {most} times before (`ray.max_restarts`). "
                f"{self._end_of_log()}"
            )
        self._restarts += 1
        self._logs.tell(f"{name} {why}. It is started again ({self._restarts} of {most})", "server")
        if self._worker is None:
            self._begin()
        else:
            self._launch(self._worker)
