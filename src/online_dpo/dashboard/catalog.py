"""The runs that the dashboard shows: all run folders in and below the folders it was given."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from online_dpo.dashboard.index.background import Background
from online_dpo.dashboard.index.run_index import RunIndex
from online_dpo.dashboard.summary import Summarizer
from online_dpo.runs.layout import is_run_folder
from online_dpo.runs.reading import RunFolder

MOST_FOLDERS = 20_000
DEEPEST = 12
FRESH = 2.0
"""Seconds for which a look at the folders holds."""

LONGEST_WAIT = 0.1
"""Seconds of a look for which a page waits; longer ones take place in the background, but for the first."""

NEVER_INSIDE = re.compile(r"checkpoint-\d+|__pycache__|node_modules|wandb|mlruns|\..*")


@dataclass(frozen=True)
class Run:
    """A run: its name in links, its name for people, its folder and its index.

    >>> Run(id="chat-3fa9c1", name="sweep/chat", folder=RunFolder("runs/sweep/chat"), ...)
    """

    id: str
    name: str
    folder: RunFolder
    index: RunIndex
    summarizer: Summarizer


class Catalog:
    """Finds runs, and gives each an index in a temporary folder of this launch.

    Args:
        roots: folders to look in; they are runs themselves, or have runs below them.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.absolute() for root in roots]
        self.is_cut = False
        """Whether there are more folders than are looked at."""

        self._indices = tempfile.TemporaryDirectory(prefix="online-dpo-dashboard-", ignore_cleanup_errors=True)
        self._numbers = count()
        self._background = Background()
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._looked, self._took = -FRESH, 0.0

    def runs(self) -> list[Run]:
        """All runs that are there now, by name."""
        is_stale = time.monotonic() - self._looked >= FRESH
        if is_stale and self._took > LONGEST_WAIT:
            self._background.want(self._look_again)
        elif is_stale:
            self._look_again()
        return list(self._runs.values())

    def find(self, run_id: str) -> Run | None:
        """The run of a link: only what `runs` has found can be reached."""
        return self._runs.get(run_id) or next((run for run in self.runs() if run.id == run_id), None)

    def close(self) -> None:
        """Remove the indices."""
        self._background.close()
        for run in list(self._runs.values()):
            run.index.close()
        self._indices.cleanup()

    def _look_again(self, seconds: float = 0.0) -> bool:
        with self._lock:
            began = time.monotonic()
            if began - self._looked >= FRESH:
                self._look()
                self._looked = time.monotonic()
                self._took = self._looked - began
        return True

    def _look(self) -> None:
        found: dict[str, Run] = {}
        self.is_cut = False
        for root in self.roots:
            for folder in self._folders_below(root):
                if is_run_folder(folder):
                    run_id = _id_of(folder)
                    found[run_id] = self._runs.get(run_id) or self._new(run_id, root, folder)
        for run_id in self._runs.keys() - found.keys():
            self._runs[run_id].index.close()
        self._runs = dict(sorted(found.items(), key=lambda item: item[1].name.lower()))

    def _new(self, run_id: str, root: Path, folder: Path) -> Run:
        name = folder.name if folder == root else str(folder.relative_to(root))
        if len(self.roots) > 1 and folder != root:
            name = f"{root.name}/{name}"
        name = name.encode("utf-8", "replace").decode("utf-8")
        run_folder = RunFolder(folder)
        # a number, for a folder may be removed and made anew, and pages still read the older index
        database = Path(self._indices.name) / f"{run_id}-{next(self._numbers)}.sqlite"
        index = RunIndex(run_folder, database, self._background)
        return Run(run_id, name, run_folder, index, Summarizer(run_folder))

    def _folders_below(self, root: Path) -> Iterator[Path]:
        """The folder and those below it. Links are not followed: they may lead anywhere, or in a circle."""
        waiting, seen = [(root, 0)], 0
        while waiting:
            folder, depth = waiting.pop()
            yield folder
            seen += 1
            if seen >= MOST_FOLDERS:
                self.is_cut = True
                return
            try:
                with os.scandir(folder) as entries:
                    inside = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            if depth < DEEPEST:
                waiting += [(folder / name, depth + 1) for name in inside if not NEVER_INSIDE.fullmatch(name)]


def _id_of(folder: Path) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", folder.name).strip("-")[:40] or "run"
    return f"{readable}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"
