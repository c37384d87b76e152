"""Everything that awaits a GPU, by one command: tests, decoding, steps, TRL, memory, kernels.

    make gpu                                       all parts that 25 minutes hold; call it again for the others
    python benchmarks/gpu.py --list                the parts, with what they show and whether they are done
    python benchmarks/gpu.py --parts card head     these; --from head: this one and those after it
    python benchmarks/gpu.py --dry-run             all of it on a CPU with tiny models
    python benchmarks/gpu.py --wheels              what has to be carried to a machine without a package index

Each part is a process of its own with a time limit; what fails or hangs is told, with its last lines, and the next part
begins. After each one the results stand in benchmarks/results/ as JSON and as a page. A part that has passed with the
same code, packages and kind of card is not repeated, unless --again is given. The package need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from gpu_parts.card import card_name, card_state
from gpu_parts.plan import PARTS, Part, Setup, tables_of
from gpu_parts.record import DONE, LINES_SHOWN, ROOT, Record, code_digest, commit
from gpu_parts.wheels import print_wheels

MINUTES = 25
REHEARSAL_LIMIT = 4.0
"""A rehearsal may take this many times as long as a card: its machine may have other things to do."""
TICK = 2.0
"""Seconds between two looks at the card's state while a part runs."""
LEAST_SHARE = 0.5
"""A part begins only if this share of its time limit is left."""
PATHS = [ROOT / "src", ROOT / "benchmarks", ROOT / "tests"]


def refuse(message: str) -> NoReturn:
    print(f"gpu.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def environment(cards: int, dry_run: bool) -> dict[str, str]:
    """Of a part: the package from this checkout, no network, and as many cards as it needs."""
    given = os.environ.get("PYTHONPATH")
    own = {
        "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *([given] if given else [])]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if dry_run:
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if cards == 1:
        own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | own


class Runner:
    """Runs parts, and writes the record after each.

    Args:
        record: where results go.
        setup: how parts run.
        minutes: for all parts together.
        limit_factor: multiplies the parts' limits; tests lower it.
    """

    def __init__(self, record: Record, setup: Setup, minutes: float, limit_factor: float = 1.0) -> None:
        self.record, self.setup = record, setup
        self._end = time.monotonic() + 60 * minutes
        self._limit_factor = limit_factor
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self.left: list[str] = []

    def run_all(self, parts: Sequence[Part], jobs: int) -> None:
        """Runs the parts, one at a time on a card."""
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(self.run, part) for part in parts]
            try:
                while waiting:  # awake now and then: a signal may reach a thread that cannot act on it
                    ended = wait(waiting, timeout=TICK).done
                    waiting = [future for future in waiting if future not in ended]
                    for future in ended:
                        future.result()
            except BaseException:
                for future in waiting:
                    future.cancel()
                with self._lock:
                    self._stopped = True  # no other part begins
                    for process in self._running:
                        kill(process)
                raise

    def run(self, part: Part) -> None:
        """Runs one part, unless it cannot be here or the time is over."""
        reason = why_not_here(part, self.setup)
        if reason is not None:
            self._note(part, "not here", 0.0, [], reason, [], card_state()[1])
            return
        left, limit = self._end - time.monotonic(), part.limit * self._limit_factor
        if self._stopped or left < LEAST_SHARE * limit:
            self.left.append(part.name)
            return
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "written.json"
            words = part.command(self.setup, out)
            print(f"{part.name}: at most {min(left, limit):.0f} s", flush=True)
            begin = time.monotonic()
            status, said, state = self._process(part, words, min(left, limit), Path(folder) / "said")
            try:
                tables = tables_of(part, out)
            except (KeyError, ValueError) as error:  # it was killed while it wrote
                tables, said = [], f"{said}\nIts figures cannot be read: {error!r}"
            shown = [word if word != str(out) else "FILE" for word in words]
        self._note(part, status, time.monotonic() - begin, shown, said, tables, state)

    def _process(self, part: Part, words: list[str], limit: float, log: Path) -> tuple[str, str, str]:
        """The status of a part that has run, the last lines that it has said, and the card's state when it worked
        hardest.
        """
        end, states = time.monotonic() + limit, [card_state()]
        with log.open("w") as said:
            with self._lock:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                    env=environment(part.cards, self.setup.dry_run),
                    start_new_session=True,  # so that what it starts can be killed with it
                )
                self._running.add(process)
                if self._stopped:
                    kill(process)
            try:
                while (code := process.poll()) is None and (left := end - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=min(TICK, left))
                    states.append(card_state())
                status = "timed out" if code is None else "ok" if code == 0 else "failed"
            finally:
                kill(process)  # and what it has left running
                with self._lock:
                    self._running.discard(process)
        lines = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        if code is not None and code != 0:
            lines.append(f"It ended with status {code}.")
        return status, "\n".join(lines), max(states)[1]

    def _note(
        self,
        part: Part,
        status: str,
        seconds: float,
        words: list[str],
        said: str,
        tables: list[dict[str, Any]],
        state: str,
    ) -> None:
        entry = {
            "status": status,
            "seconds": seconds,
            "shows": part.shows,
            "command": shlex.join(["python", *words]) if words else "not run",
            "state": state,
            "last_lines": said,
            "tables": tables,
        }
        with self._lock:
            self.record.add(part.name, entry)
            print(f"{part.name}: {status}, {seconds:.0f} s", flush=True)
            if status not in DONE:
                print("\n".join(f"  {line}" for line in said.splitlines()[-8:]), flush=True)


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why_not_here(part: Part, setup: Setup) -> str | None:
    """Why a part cannot run on this machine; ``None`` if it can."""
    if part.package is not None and find_spec(part.package) is None:
        return f"The package {part.package} is not installed."
    if setup.dry_run or part.cards == 1:
        return None
    import torch

    count = torch.cuda.device_count()  # of NVML's: it takes no memory of a card
    return None if count >= part.cards else f"It needs {part.cards} cards, and {count} can be used."


def facts(setup: Setup) -> dict[str, Any]:
    """About the machine and the code."""
    sys.path.insert(0, str(ROOT / "src"))  # the package need not be installed
    from measure import describe_machine, versions

    name = None if setup.dry_run else card_name()
    return {
        "device": name or describe_machine("cpu", len(os.sched_getaffinity(0))),
        "dry_run": setup.dry_run,
        "code": code_digest(),
        "commit": commit(),
        "versions": versions(),
        "state": card_state()[1],
    }


def chosen_parts(options: argparse.Namespace) -> list[Part]:
    """The parts that are asked for, in the order of the plan."""
    names = [part.name for part in PARTS]
    for name in [*(options.parts or []), *([options.first] if options.first else [])]:
        if name not in names:
            refuse(f"there is no part {name!r}; there are {', '.join(names)}")
    first = names.index(options.first) if options.first else 0
    return [part for part in PARTS[first:] if not options.parts or part.name in options.parts]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", metavar="NAME", help="only these")
    add("--from", dest="first", metavar="NAME", help="this one and those after it")
    add("--again", action="store_true", help="parts that are done, too")
    add("--minutes", type=float, default=MINUTES, help=f"no part begins that would last longer (default: {MINUTES})")
    add("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results, for a dry run a new folder in /tmp")
    add("--list", action="store_true", help="name the parts, and run none")
    add("--dry-run", action="store_true", help="on a CPU, with tiny models and few steps")
    add("--jobs", type=int, metavar="N", help="parts of a dry run at the same time (default: 2)")
    add("--wheels", action="store_true", help="list the packages that are missing, and run nothing")
    add("--installed", type=Path, metavar="FILE", help="with --wheels: `pip freeze` of the machine they are missing on")
    add("--python", metavar="VERSION", help="with --wheels: that machine's Python, such as 3.12")
    options = parser.parse_args()
    if options.minutes <= 0 or (options.jobs is not None and options.jobs < 1):
        refuse("--minutes and --jobs must be above 0")
    if options.jobs and not options.dry_run:
        refuse("--jobs is for dry runs: on a card, parts would disturb each other")
    if options.installed is not None and not options.installed.is_file():
        refuse(f"--installed {options.installed}: there is no such file")
    return options


def main() -> int:
    options = parse()
    if options.wheels:
        return print_wheels(options.installed, options.python)
    setup, parts = Setup(options.dry_run), chosen_parts(options)
    if not options.dry_run and not options.list:
        import torch

        if torch.cuda.device_count() == 0:
            refuse("torch finds no CUDA device here; --dry-run goes through all parts on a CPU")
    known = facts(setup)
    folder = options.out or (Path(tempfile.mkdtemp()) if options.dry_run else ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    name = "dry-run" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")
    record = Record.opened(folder / f"gpu-{name}.json", known)
    if options.list:
        total = 0.0
        for part in parts:
            total += part.limit
            status = "done" if record.is_done(part.name) else record.parts.get(part.name, {}).get("status", "not run")
            print(f"{part.name:22}{part.limit:5.0f} s {total / 60:5.1f} min  {status:10} {part.shows}")
        return 0
    wanted = [part for part in parts if options.again or not record.is_done(part.name)]
    for part in parts:
        if part not in wanted:
            print(f"{part.name}: done before")
    runner = Runner(record, setup, options.minutes, REHEARSAL_LIMIT if options.dry_run else 1.0)
    record.write()
    runner.run_all(wanted, (options.jobs or 2) if options.dry_run else 1)
    if runner.left:
        print(f"Not begun in {options.minutes:g} minutes: {' '.join(runner.left)}. The next call goes on with them.")
    print(record.page)
    return int(any(record.parts[part.name]["status"] not in DONE for part in wanted if part.name not in runner.left))


def end_on_signal(number: int, _frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_signal)
    sys.exit(main())
