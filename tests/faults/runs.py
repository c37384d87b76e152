"""Starts runs in forks of the zygote, and says how they ended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from faults.ground import write_files
from faults.harness import Fault, Respond, Writes
from support.endpoint import Answer, serving
from support.processes import environment, free_port

HERE = Path(__file__).parent
WHAT = {"kill before": 1, "kill within": 2, "fail once": 3, "fail from there": 4}
"""The numbers of these in `writes.c`."""


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended: its exit code (minus the signal that ended it), and what it printed."""

    code: int
    stdout: str
    stderr: str
    hung: bool
    stack: str

    @property
    def printed(self) -> str:
        return self.stdout + self.stderr


class Zygote:
    """The warmed process. ``variables`` stand in its environment, and so in that of its forks."""

    def __init__(self, model: Path, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote", str(model)],
            env=environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has died"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def build_writes(library: Path) -> Path:
    """Builds `writes.c`."""
    words = ["-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "writes.c"), "-ldl"]
    subprocess.run([os.environ.get("CC", "cc"), *words], check=True)
    return library


class Running:
    """The processes of one run, by rank."""

    def __init__(self, zygote: Zygote, pids: list[int], folder: Path, logs: list[Path], limit: float) -> None:
        self.pids, self.folder, self.logs = pids, folder, logs
        self._zygote, self._limit = zygote, limit
        self._began = time.monotonic()
        self._codes: dict[int, int] = {}
        self.whole_seconds = 0.0
        """How long the run takes without the fault; for faults that are done from outside."""

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to these ranks, or to all."""
        for rank, pid in enumerate(self.pids):
            if (ranks is None or rank in ranks) and rank not in self._codes:
                os.kill(pid, number)

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Waits until a rank has printed ``text``."""
        until = time.monotonic() + seconds
        while not any(
            text in path.read_text(errors="replace")
            for log in self.logs
            for path in (log / "stdout", log / "stderr")
            if path.is_file()
        ):
            assert time.monotonic() < until, f"never printed: {text}"
            assert not self.ended(), f"ended without: {text}"
            time.sleep(0.003)

    def printed(self) -> str:
        """What all ranks have printed so far."""
        return "".join(_text(log / name) for log in self.logs for name in ("stdout", "stderr"))

    def wait_until(self, seconds: float) -> None:
        """Waits until so many seconds after the start, or until all have ended."""
        while time.monotonic() < self._began + seconds and not self.ended():
            time.sleep(0.001)

    def wait_more(self, seconds: float) -> None:
        """Waits so many seconds, or until all have ended."""
        self.wait_until(time.monotonic() - self._began + seconds)

    def wait_rank(self, rank: int) -> bool:
        """Waits until this rank has ended, or the limit is over; returns whether it has."""
        return self._poll(rank, self._began + self._limit - time.monotonic())

    def ended(self) -> bool:
        """Whether all have."""
        return all(self._poll(rank, 0.0) for rank in range(len(self.pids)))

    def _poll(self, rank: int, seconds: float) -> bool:
        if rank not in self._codes:
            answer = self._zygote.ask({"wait": {"pid": self.pids[rank], "seconds": seconds}})
            if answer is not None:
                self._codes[rank] = answer["code"]
        return rank in self._codes

    def wait(self) -> list[Ended]:
        """How all ranks ended; what takes longer than the limit is killed."""
        hung = set()
        for rank in range(len(self.pids)):
            left = self._began + self._limit + 1.0 - time.monotonic()
            if not self._poll(rank, max(left, 0.0)):
                hung.add(rank)
                os.kill(self.pids[rank], signal.SIGKILL)
                self._poll(rank, 60.0)
        texts = [[_text(log / name) for name in ("stdout", "stderr", "stack")] for log in self.logs]
        return [Ended(self._codes[rank], out, err, rank in hung, stack) for rank, (out, err, stack) in enumerate(texts)]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


class Stage:
    """Where faults happen: folders filled from the ground, a zygote, and the runs without a fault."""

    def __init__(self, root: Path, ground: Path) -> None:
        self.root, self.ground = root, ground
        self.zygote = Zygote(ground / "policy", LD_PRELOAD=str(build_writes(root / "writes.so")))
        self._whole: dict[str, Path] = {}
        self._numbers = count()
        self._seconds: dict[str, float] = {}

    def folder(self, fault: Fault, name: str, url: str = "") -> Path:
        """A new folder with the files of this fault, whose service has this address."""
        folder = self.root / name
        shutil.copytree(self.ground, folder)
        write_files(folder, fault, url)
        if fault.trained is not None:
            whole = self.whole(fault.but(options={**fault.options, **fault.trained}))
            shutil.copytree(whole / "out", folder / "out")
        if fault.prepare is not None:
            fault.prepare(folder)
        return folder

    def start(
        self,
        folder: Path,
        fault: Fault,
        words: Sequence[str],
        injects: bool,
        logs: Path,
        write: tuple[Writes, int] | None = None,
    ) -> Running:
        """Starts the run's processes; ``injects`` the fault into them, and one at the ``write`` with this number."""
        pids, places = [], []
        ranks = dict(WORLD_SIZE=str(fault.processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        for rank in range(fault.processes):
            place = logs / f"rank-{rank}"
            place.mkdir(parents=True)
            own = {**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            request = {
                "folder": str(folder),
                "words": list(words),
                "environment": {**(own if fault.processes > 1 else {}), **fault.environment},
                "inject": fault.id if injects and fault.inject is not None else None,
                "limit": fault.limit,
                "writes": None if write is None else self._armed(*write, rank, folder, place),
                **{name: str(place / name) for name in ("stdout", "stderr", "stack")},
            }
            pids.append(self.zygote.ask(request))
            places.append(place)
        return Running(self.zygote, pids, folder, places, fault.limit)

    @staticmethod
    def _armed(writes: Writes, number: int, rank: int, folder: Path, place: Path) -> dict[str, Any]:
        what = WHAT[writes.what] if rank == writes.rank and number else 0
        log = str(place / "writes")
        return dict(below=str(folder / "out"), number=number, what=what, error=writes.error, log=log)

    def whole_seconds(self, fault: Fault) -> float:
        """How long a run takes with the options of this fault, and without it."""
        return self._seconds[self.whole(fault).name]

    def writes(self, fault: Fault) -> list[str]:
        """What is written into the output folder by the rank that the fault concerns, without the fault."""
        assert fault.writes is not None
        name = self.whole(fault).name
        return (self.root / f"{name}-logs" / f"rank-{fault.writes.rank}" / "writes").read_text().splitlines()

    def whole(self, fault: Fault) -> Path:
        """The folder after a run with the options of this fault, and without it; made once for the same options."""
        service = fault.service and fault.service.right
        files = str(without_fault(fault).files)
        key = json.dumps([fault.options, fault.processes, service and service.__qualname__, files], sort_keys=True)
        if key not in self._whole:
            name = f"whole-{next(self._numbers)}"
            with self.served(fault) as served:
                served.respond = service or served.respond
                plain = without_fault(fault)
                folder = self.folder(plain, name, served.url)
                began, logs = time.monotonic(), self.root / f"{name}-logs"
                counting = (Writes("kill before"), 0)
                ended = self.start(folder, plain, ("train", "run.yaml"), False, logs, counting).wait()
            self._seconds[name] = time.monotonic() - began
            assert all(one.code == 0 for one in ended), [one.printed for one in ended]
            self._whole[key] = folder
        return self._whole[key]

    @contextmanager
    def served(self, fault: Fault) -> Iterator[Served]:
        """The service of a fault, while it is needed; without one, there is no server."""
        served = Served(fault.service and fault.service.faulty)
        if fault.service is None:
            yield served
            return
        with serving(lambda body, number: served.answer(body, number)) as endpoint:
            served.url = endpoint.url
            yield served

    def close(self) -> None:
        self.zygote.close()


@dataclass
class Served:
    """The address of a service, and what makes its answers now."""

    respond: Respond | None
    url: str = ""

    def answer(self, body: dict[str, Any], number: int) -> Answer:
        assert self.respond is not None
        return self.respond(body, number)


def without_fault(fault: Fault) -> Fault:
    """The run with nothing done to it. Beside a service, the files and the environment say how to ask it."""
    needed = {} if fault.service else {"files": {}, "environment": {}}
    return replace(fault, **needed, trained=None, prepare=None, inject=None, outside=None, writes=None)


def weights_hash(folder: Path) -> str:
    """Of all tensors' files of a model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
