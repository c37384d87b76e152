"""Which of several processes does not come to a collective operation, and what it does instead.

Each process writes into the store of the process group, twice a second, what it waits for. A daemon thread does so:
it goes on while the main thread hangs in a function, and it stops when the process is stopped or killed. So the others
can tell the two apart, and name who is missing.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from online_dpo.distributed.waiting import WAITS, Waits
from online_dpo.errors import OnlineDPOError, RankLostError, error_text, is_out_of_memory, named_error

BEAT_SECONDS, RANKS_PER_BEAT = 0.5, 128  # with more ranks, each of them writes and reads less often
SILENT_SECONDS = 3.0
END_SECONDS = 5.0
"""How long the main thread may take to end by itself once another rank has failed."""

STORE_SECONDS = 5.0
"""How long the store may take to answer."""

BACKEND_ERROR = re.compile(r"gloo|nccl|ProcessGroup|pair closure|Connection (closed|reset)|Timed out waiting", re.I)
SHOWN = 3


@dataclass
class Seen:
    """What another rank has written last, and when this process saw it change.

    ``number`` counts what it has written; 0: nothing yet. ``doing`` is what it waits for, or empty, and ``seconds`` for
    how long; ``step`` is the number of steps that it has done. ``failure`` is the error with which it has failed, and
    ``failed`` when this process learned of it.
    """

    number: int
    doing: str
    seconds: float
    step: int
    changed: float
    failure: str = ""
    failed: float = 0.0

    @property
    def silence(self) -> float:
        """Seconds since it was heard of."""
        return time.monotonic() - self.changed


class RankWatch:
    """Tells the other processes what this one does, and finds out which of them is missing.

    Args:
        store: the store of the process group.
        rank: that of this process.
        size: the number of processes.
        limit: seconds after which a collective operation gives up (``ddp_timeout``).
        holder: the rank that holds the store; ``None`` if torchrun does.
        raises: whether a collective operation that fails raises an error, as with gloo, or ends the process, as with
            NCCL.
        waits: what this process waits for.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        limit: float,
        holder: int | None,
        raises: bool = True,
        waits: Waits = WAITS,
    ) -> None:
        self.rank, self.size, self.limit, self._holder, self._waits = rank, size, limit, holder, waits
        self._patience = limit + END_SECONDS if raises else 0.9 * limit
        self.step = 0
        """The steps that are done."""
        self._interval = BEAT_SECONDS * max(1.0, size / RANKS_PER_BEAT)
        self._silent = max(SILENT_SECONDS, 4 * self._interval)
        # one of each thread: an operation may block, where the process that holds the store is stopped
        self._store, self._notes = self._clone(store), self._clone(store)
        self._began = self._answered = time.monotonic()
        self._seen = {other: Seen(0, "", 0.0, 0, self._began) for other in range(size) if other != rank}
        self._number = 0
        self._lost_store: float | None = None
        """When the store was lost."""
        self._blamed: float | None = None
        """When another rank has given up waiting for this one."""
        self._guarded = False
        self._closed = threading.Event()

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="online-dpo-ranks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread: this rank falls silent. Before the interpreter ends, the thread must have left torch's code,
        which would abort the process. An answer of the store is waited for no longer than it may take.
        """
        self._closed.set()
        self._thread.join(STORE_SECONDS)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, the process ends if its main thread cannot, because it waits for something that does not come."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False

    @property
    def has_lost_store(self) -> bool:
        """Whether the store does not answer, so that nothing more can be learned of the others."""
        return self._lost_store is not None or time.monotonic() - self._answered > self._silent

    def tell_failure(self, error: BaseException) -> None:
        """Tells the other ranks that this one ends with an error; and those that are to blame, that they are."""
        for rank in error.ranks if isinstance(error, RankLostError) else ():
            self.put(f"blamed-{rank}", b"")
        self.put(f"failure-{self.rank}", json.dumps([self.step, named_error(error)]).encode())

    def put(self, name: str, value: bytes) -> None:
        """Writes something that all ranks can read; without a store it has no effect."""
        with suppress(RuntimeError):
            self._notes.set(name, value)

    def get(self, name: str) -> bytes | None:
        """Reads what a rank has written; ``None`` if nothing was, or if the store does not answer any more."""
        found: list[bytes] = []

        def read() -> None:
            with suppress(RuntimeError):
                found.extend([self._notes.get(name)] if self._notes.check([name]) else [])

        if not self.has_lost_store:
            # in a thread: where the process that holds the store is stopped, `check` never returns
            reading = threading.Thread(target=read, name="online-dpo-notes-of-ranks", daemon=True)
            reading.start()
            reading.join(STORE_SECONDS)
            if reading.is_alive():
                self._lost_store = time.monotonic()
        return found[0] if found else None

    def explain(self, error: Exception) -> RankLostError:
        """Returns the error that names who is missing, for an error of a collective operation."""
        timed_out = re.search("time ?d? ?out", str(error), re.IGNORECASE) is not None
        until = time.monotonic() + (0 if timed_out else self._silent + 2 * self._interval)
        while not (missing := self.missing()) and time.monotonic() < until:
            time.sleep(self._interval / 2)
        if text := self._describe_all(missing or self._late()):
            waited = f" This process waited for `ddp_timeout`, {self.limit:g} seconds." if timed_out else ""
            return RankLostError(text + waited, missing or self._late())
        return RankLostError(
            f"The other processes do not answer, although none of them is known to be missing: "
            f"{error_text(error, first_line=True)}",
            (),
        )

    def missing(self) -> list[int]:
        """Returns the ranks that have failed or are silent; -1 stands for torchrun."""
        failed = sorted(rank for rank, seen in self._seen.items() if seen.failure)
        if failed:
            return failed
        if self.has_lost_store:
            return [-1 if self._holder is None else self._holder]
        return sorted(rank for rank, seen in self._seen.items() if self._answered - seen.changed > self._silent)

    def describe_others(self) -> str:
        """Returns what is known of the ranks that are missing or late, in one line."""
        return self._describe_all(self.missing() or self._late())

    def _late(self) -> list[int]:
        """The ranks that wait for something else than other ranks, the longest first."""
        busy = [rank for rank, seen in self._seen.items() if seen.doing]
        return sorted(busy, key=lambda rank: -self._seen[rank].seconds)

    def _describe_all(self, ranks: Sequence[int]) -> str:
        more = [f"{len(ranks) - SHOWN} more ranks are missing."] if len(ranks) > SHOWN else []
        return " ".join([*map(self._describe, ranks[:SHOWN]), *more])

    def _describe(self, rank: int) -> str:
        gone = "it was stopped or killed, has ended, or its machine cannot be reached"
        if rank not in self._seen:
            return f"torchrun, which keeps the processes together, cannot be reached any more: {gone}."
        seen = self._seen[rank]
        if seen.number == 0:
            return f"Rank {rank} has not been heard of since the start, {seen.silence:.0f} s ago: {gone}."
        at = f"after step {seen.step}" + (f", in {seen.doing}" if seen.doing else "")
        if seen.failure:
            return f"Rank {rank} has failed after step {seen.step}: {seen.failure.rstrip('.')}."
        if rank in self.missing():
            return f"Rank {rank} has not been heard of for {seen.silence:.0f} s ({at}): {gone}."
        return f"Rank {rank} has been in {seen.doing} for {seen.seconds:.0f} s (after step {seen.step})."

    def _clone(self, store: Any) -> Any:
        clone = dist.PrefixStore("online_dpo", store.clone())  # pyright: ignore[reportPrivateImportUsage]
        clone.set_timeout(timedelta(seconds=STORE_SECONDS))
        return clone

    def _run(self) -> None:
        wait = 0.0
        while not self._closed.wait(wait):
            if self._lost_store is None:
                self._exchange()
            self._end_if_stuck()
            wait = self._interval

    def _exchange(self) -> None:
        try:
            self._beat()
            self._read()
            self._answered = time.monotonic()
        except dist.DistStoreError:  # a time-out
            pass
        except RuntimeError:
            self._lost_store = time.monotonic()

    def _beat(self) -> None:
        doing = next((wait for wait in self._waits.innermost() if not wait.on_ranks), None)
        self._number += 1
        beat = [self._number, doing.who if doing else "", doing.seconds if doing else 0.0, self.step]
        self._store.set(f"beat-{self.rank}", json.dumps(beat))

    def _read(self) -> None:
        begun = [rank for rank, seen in self._seen.items() if seen.number or self._store.check([f"beat-{rank}"])]
        beats = self._store.multi_get([f"beat-{rank}" for rank in begun]) if begun else []
        now = time.monotonic()
        for rank, beat in zip(begun, beats, strict=True):
            number, doing, seconds, step = json.loads(beat)
            seen = self._seen[rank]
            changed = now if seen.number != number else seen.changed
            seen = Seen(number, doing, seconds, max(step, seen.step), changed, seen.failure, seen.failed)
            if not seen.failure and self._store.check([f"failure-{rank}"]):
                seen.step, seen.failure = json.loads(self._store.get(f"failure-{rank}"))
                seen.failed = now
            self._seen[rank] = seen
        if self._blamed is None and self._store.check([f"blamed-{self.rank}"]):
            self._blamed = now

    def _end_if_stuck(self) -> None:
        """Ends the process if another rank is lost and the main thread cannot come to know of it.

        That is, it hangs in a function and others have given up waiting for it; or it waits for a silent rank for so
        long that a backend which raises errors, as gloo does, would have raised one. NCCL's ends the process without a
        word, so that this thread must come first.
        """
        own = next((wait for wait in self._waits.innermost() if not wait.on_ranks), None)
        lost = self._ended() if own is not None else self._silent_for_good()
        if lost and self._guarded:
            line = self._describe(lost[0])
            if own is not None:
                line = f"The run has ended on other processes while this one was still in {own.who}."
            os.write(2, f"error: {line} This process ends without a further checkpoint.\n".encode())
            _say_last_words(line)
            os._exit(1)

    def _ended(self) -> list[int]:
        """Returns the ranks that have ended, if this one cannot save anything in place of them: it is to blame itself,
        or the store is lost. After another failure it has as long as in a collective operation.
        """
        now = time.monotonic()
        known = [since for since in (self._lost_store, self._blamed) if since is not None]
        if known and now - min(known) > END_SECONDS:
            return self.missing()
        return [rank for rank, seen in self._seen.items() if seen.failure and now - seen.failed > self._patience]

    def _silent_for_good(self) -> list[int]:
        return [rank for rank in self.missing() if rank in self._seen and self._seen[rank].silence > self._patience]


LAST_WORDS: list[Callable[[str], None]] = []
"""Called with the reason, in a thread, before a process ends itself because it hangs; they have `LAST_SECONDS`."""
LAST_SECONDS = 2.0


def _say_last_words(reason: str) -> None:
    threads = [threading.Thread(target=say, args=(reason,), daemon=True) for say in LAST_WORDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LAST_SECONDS)


_watch: RankWatch | None = None


def watch_ranks(limit: float) -> RankWatch | None:
    """Starts to watch the other processes, unless this has been done; returns ``None`` in a single process."""
    global _watch
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _watch is None:
        store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportAttributeAccessIssue]
        holder = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        raises = "nccl" not in dist.get_backend()
        _watch = RankWatch(store, dist.get_rank(), dist.get_world_size(), limit, holder, raises)
        _watch.start()
        atexit.register(_watch.close)
        WAITS.details = _watch.describe_others
    return _watch


def current_watch() -> RankWatch | None:
    """Returns the watch over the other processes; ``None`` if there is none."""
    return _watch


def explained(error: BaseException) -> BaseException:
    """Returns the error that names who is missing, if this is an error of a collective operation; else ``error``. One
    of a backend whose memory has run out here, such as NCCL's, names nobody else.
    """
    if _watch is None or isinstance(error, OnlineDPOError) or not isinstance(error, RuntimeError):
        return error
    if is_out_of_memory(error):
        return error
    of_backend = isinstance(error, dist.DistError) or BACKEND_ERROR.search(str(error))  # pyright: ignore
    return _watch.explain(error) if of_backend or _watch.missing() else error
