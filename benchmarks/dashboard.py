"""What the dashboard takes on many and large runs: the time of each page, cold and warm, and the server's memory.

    python benchmarks/dashboard.py --json benchmarks/results/dashboard.json

It makes 50 runs of 20,000 groups, one of them with 50,000 rows of metrics and the others with 1,000 each, starts
``online-dpo dashboard`` on them and asks for pages one after the other, as a browser does. "Cold" is the first time
after the start, "warm" the median of several when the index is complete. Seconds of the processor are the server's own,
which other work on the machine hardly lengthens.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import run_folders

MOST_SECONDS, MOST_MEGABYTES = 0.3, 200
WARM = 7


@dataclass(frozen=True)
class Figure:
    """A page's seconds, by the clock and of the processor, and its size in kB."""

    page: str
    cold: float
    cold_processor: float
    warm: float
    warm_processor: float
    kilobytes: float


class Server:
    """A dashboard in a process of its own, and one connection to it."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-m", "online_dpo", "dashboard", str(folder), "--port", "0", "--no-browser"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", self._process.stdout.readline())
        assert found, "the dashboard has not printed its address"
        self._connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=120)
        self._headers = {"Cookie": f"online_dpo_{found[1]}={found[2]}"}
        self.watched = psutil.Process(self._process.pid)

    def get(self, path: str) -> tuple[float, float, bytes]:
        """A page: its seconds by the clock and of the processor, and its content."""
        before, began = self._processor(), time.perf_counter()
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        assert answer.status == 200, (path, answer.status, content[:300])
        return time.perf_counter() - began, self._processor() - before, content

    def _processor(self) -> float:
        times = self.watched.cpu_times()
        return times.user + times.system

    @property
    def megabytes(self) -> float:
        """The server's memory."""
        return self.watched.memory_info().rss / 2**20

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@contextmanager
def folders(given: Path | None, runs: int, rows: int, large: int, groups: int) -> Iterator[Path]:
    """The run folders; those that are there already are used again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary)
        if not (folder / "run-00").is_dir():
            run_folders.make(folder / "run-00", large, groups, 0, judged=True, state="running")
            run_folders.make(folder / "run-01", rows, groups, 1)
            for number in range(2, runs):
                shutil.copytree(folder / "run-01", folder / f"run-{number:02}")
        yield folder


def pages(server: Server) -> dict[str, str]:
    """The pages that are measured, by name."""
    ids = re.findall(r'id="run-([^"]+)"', server.get("/runs")[2].decode())
    big = next(run for run in ids if run.startswith("run-00"))
    other = next(run for run in ids if run.startswith("run-01"))
    charts = "&".join(f"metric={name}" for name in CHARTS)
    return {
        "all runs": "/runs?sort=-step",
        "a run's charts": f"/runs/{big}",
        "points of 12 charts": f"/runs/{big}/series?points=400&{charts}",
        "points of 12 charts, smoothed": f"/runs/{big}/series?points=400&smoothing=0.9&{charts}",
        "points of 12 charts, zoomed": f"/runs/{big}/series?points=400&from=20000&to=21000&{charts}",
        "events in charts": f"/runs/{big}/marks",
        "two runs overlaid": f"/runs/{big}?with={other}",
        "events": f"/runs/{big}/events",
        "settings": f"/runs/{big}/settings",
        "two runs compared": f"/compare?run={big}&run={other}",
        "pairs": f"/runs/{big}/pairs",
        "pairs of a step": f"/runs/{big}/pairs?step_min=700&step_max=700",
        "pairs by surprise": f"/runs/{big}/pairs?sort=-surprise",
        "pairs with a text": f"/runs/{big}/pairs?q=river+seven",
        "judge": f"/runs/{big}/judge",
        "vote": f"/runs/{big}/vote",
    }


CHARTS = [
    *("loss", "objective/scores", "objective/kl", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "grad_norm", "logps/chosen", "logps/rejected", "completions/mean_length", "time/rollout"),
]


def measure(folder: Path) -> tuple[list[Figure], dict[str, float]]:
    """Figures of all pages, and of the server's memory and index."""
    server = Server(folder)
    try:
        first = server.get("/runs")
        cold = {name: server.get(path) for name, path in pages(server).items()}
        cold["all runs"] = first
        memory = {"after the first pages": server.megabytes}
        began = time.perf_counter()
        paths = pages(server)
        while b"of the files read so far" in server.get(paths["pairs"])[2] and time.perf_counter() - began < 900:
            time.sleep(0.2)
        memory["seconds until all groups of a run are indexed"] = time.perf_counter() - began
        figures = []
        for name, path in paths.items():
            warm = [server.get(path) for _ in range(WARM)]
            seconds, processor = (statistics.median(each[part] for each in warm) for part in (0, 1))
            size = len(warm[0][2]) / 1000
            figures.append(Figure(name, *cold[name][:2], seconds, processor, size))
        memory["at the end"] = server.megabytes
        return figures, memory
    finally:
        server.close()


def main() -> int:
    """Print the table; 1 if something takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="make the runs here, and leave them there for the next time")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1000, help="rows of metrics of each run but the first")
    parser.add_argument("--large", type=int, default=50_000, help="rows of metrics of the first run")
    parser.add_argument("--groups", type=int, default=20_000, help="groups of each run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with folders(args.folder, args.runs, args.rows, args.large, args.groups) as folder:
        figures, memory = measure(folder)
    print(f"{'page':<32}{'cold':>8}{'(cpu)':>8}{'warm':>8}{'(cpu)':>8}{'kB':>8}")
    for each in figures:
        seconds = (each.cold, each.cold_processor, each.warm, each.warm_processor)
        print(f"{each.page:<32}" + "".join(f"{1000 * part:>6.0f}ms" for part in seconds) + f"{each.kilobytes:>8.0f}")
    for name, value in memory.items():
        print(f"{name}: {value:.0f}" + ("" if "seconds" in name else " MB"))
    if args.json:
        about = {name: getattr(args, name) for name in ("runs", "rows", "large", "groups")}
        about["load_average"] = os.getloadavg()[0]
        content = {**about, "pages": [asdict(each) for each in figures], "memory": memory}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    too_slow = [each.page for each in figures if max(each.cold, each.warm) > MOST_SECONDS]
    if too_slow or memory["at the end"] > MOST_MEGABYTES:
        print(f"beyond the limits of {MOST_SECONDS} s and {MOST_MEGABYTES} MB: {too_slow or 'memory'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
