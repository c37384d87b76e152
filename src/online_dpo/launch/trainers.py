"""`Trainers`: the processes that train, which live and end together."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from online_dpo.launch.cluster import TICK, Cluster, RemoteWorker
from online_dpo.launch.commands import train_words
from online_dpo.launch.endings import how_it_ended
from online_dpo.launch.environment import in_order_of_ranks, rank_variables
from online_dpo.launch.failures import ClusterError, WorkerLost
from online_dpo.launch.job import Job
from online_dpo.launch.logs import Logs, rank_name
from online_dpo.launch.worker import Facts

KILLED = -int(signal.SIGKILL)


class Trainers:
    """All processes that train, each in a worker of its own, in the first bundles of the cluster.

    Args:
        marker: a file in ``output_dir``, by which a machine shows that it shares it.
    """

    def __init__(self, cluster: Cluster, job: Job, logs: Logs, marker: Path) -> None:
        self._cluster, self._job, self._logs = cluster, job, logs
        self._paths = [job.folder, str(marker), *job.paths]
        count = job.settings.trainers
        self._workers: list[RemoteWorker | None] = [None] * count
        self._facts: list[Facts | None] = [None] * count
        self._order = list(range(count))
        """The worker of each rank."""
        self.urls: list[str] = []
        self.codes: dict[int, int] = {}
        """The exit code of each rank that has ended, or the negative number of a signal."""
        self.killed: set[int] = set()
        """The ranks that did not end by themselves, and were killed from here."""
        self.have_started = False
        """Whether they have been started once."""
        self.first_end = ""
        """How the first rank ended that did not end well."""

    @property
    def are_over(self) -> bool:
        """Whether all have ended."""
        return len(self.codes) == len(self._workers)

    def start(self, urls: Sequence[str], checkpoint: Path | None, check: Callable[[], None]) -> None:
        """Starts all ranks, with new workers where there are none; ``check`` is called while it waits, and may raise.

        Raises:
            ClusterError: there is no room, or a machine cannot take part.
            WorkerLost: a worker was lost meanwhile.
        """
        self.urls, self.codes, self.killed, self.first_end = list(urls), {}, set(), ""
        facts = self._all_placed(check)
        self._order = in_order_of_ranks([fact.node for fact in facts])
        nodes = [facts[index].node for index in self._order]
        address = facts[self._order[0]].address
        port = int(self._do(0, RemoteWorker.call, "free_port", address))
        words = train_words(self._job.run_file, self._job.words, urls, checkpoint)
        on_gpus = self._job.settings.train_gpus > 0
        self.have_started = True
        where = ", ".join(dict.fromkeys(facts[index].address for index in self._order))
        self._logs.tell(f"starting {len(nodes)} {'processes' if len(nodes) > 1 else 'process'} to train on {where}")
        for rank in range(len(nodes)):
            own = rank_variables(nodes, rank, address, port, one_gpu_each=on_gpus)
            own |= {"PYTHONUNBUFFERED": "1", **({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})}
            self._do(rank, RemoteWorker.start, words, dict(self._job.variables), own, self._job.folder, None)

    def tick(self) -> None:
        """Takes what the ranks have printed, and how they ended."""
        for rank, index in enumerate(self._order):
            worker = self._workers[index]
            if rank in self.codes or worker is None:
                continue
            try:
                report = worker.report()
            except WorkerLost as lost:
                self._lose(rank, f"is lost: {lost}")
                continue
            if report is not None:
                self._logs.of_rank(rank, report.lines)
                if report.code is not None:
                    self._end(rank, report.code, how_it_ended(report.code))

    def send(self, number: int) -> None:
        """Sends all ranks a signal."""
        for rank in range(len(self._workers)):
            if rank not in self.codes:
                with suppress(WorkerLost):
                    self._do(rank, RemoteWorker.call, "send", number)

    def kill(self) -> None:
        """Kills the ranks that have not ended."""
        for rank in range(len(self._workers)):
            if rank not in self.codes:
                self.killed.add(rank)
                with suppress(WorkerLost):
                    self._do(rank, RemoteWorker.call, "kill")

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            if worker is not None:
                worker.discard()

    def _all_placed(self, check: Callable[[], None]) -> list[Facts]:
        """Wait until each worker has its place, and return the facts of their machines."""
        began = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker is None:
                self._workers[index] = self._cluster.worker(index, self._paths)
        while any(fact is None for fact in self._facts):
            for index, worker in enumerate(self._workers):
                assert worker is not None
                if self._facts[index] is None:
                    self._ask_for_facts(index, worker)
            if time.monotonic() - began > self._job.settings.placement_timeout:
                placed = [self._cluster.bundles[index] for index, fact in enumerate(self._facts) if fact is not None]
                raise ClusterError(self._cluster.no_room(placed))
            check()
            time.sleep(TICK)
        return [fact for fact in self._facts if fact is not None]

    def _ask_for_facts(self, index: int, worker: RemoteWorker) -> None:
        try:
            facts = worker.facts()
        except WorkerLost:
            self._workers[index] = None
            raise
        if facts is not None:
            self._job.check(facts)
            self._facts[index] = facts

    def _do(self, rank: int, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the worker of a rank."""
        worker = self._workers[self._order[rank]]
        if worker is None:
            raise WorkerLost(f"{rank_name(rank)} has no worker")
        try:
            return method(worker, *arguments)
        except WorkerLost as lost:
            self._lose(rank, f"is lost: {lost}")
            raise

    def _lose(self, rank: int, how: str) -> None:
        """A worker is gone; the next start has a new one in its place."""
        index = self._order[rank]
        worker, self._workers[index] = self._workers[index], None
        self._end(rank, KILLED, how)
        self._facts[index] = None
        if worker is not None:
            worker.discard()

    def _end(self, rank: int, code: int, how: str) -> None:
        self.codes[rank] = code
        facts = self._facts[self._order[rank]]
        if rank in self.killed:
            return
        is_cause = code < 0 and all(other >= 0 for one, other in self.codes.items() if one != rank)
        if is_cause or (code > 0 and not self.first_end):  # the others end with an error because one is lost
            self.first_end = f"{rank_name(rank)}{f' on {facts.address}' if facts else ''} {how}"
