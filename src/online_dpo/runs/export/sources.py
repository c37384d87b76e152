"""The groups of one or several run folders in the order of their steps, read one step at a time."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.runs.layout import completions_files
from online_dpo.runs.reading import RunFolder, StepFrame

Row = dict[str, Any]
UNREADABLE = "groups that cannot be read"


@dataclass(frozen=True)
class Source:
    """A run folder, and where its steps lay when it was opened: a run that goes on changes nothing here.

    >>> Source("runs/helpful", RunFolder("runs/helpful"), {0: [StepFrame(CompletionsFile(0, 0), Frame(0, 1830))]}, 0)

    ``by_rank`` has the steps of each rank in ascending order; ``torn`` are bytes at the ends of files that are no whole
    step.
    """

    name: str
    folder: RunFolder
    by_rank: dict[int, list[StepFrame]]
    torn: int

    @classmethod
    def open(cls, path: Path, name: str) -> Source:
        """Find the steps of a folder."""
        folder, torn = RunFolder(path), 0
        by_rank: dict[int, list[StepFrame]] = defaultdict(list)
        for file in completions_files(path):
            steps = list(folder.frames(file))
            by_rank[file.rank] += steps
            with suppress(FileNotFoundError):  # rotated out meanwhile
                torn += (path / file.name).stat().st_size - (steps[-1].frame.end if steps else 0)
        return cls(name, folder, dict(by_rank), torn)

    def groups(self, left_out: Counter[str]) -> Iterator[Row]:
        """The groups of all ranks by step. What cannot be read is counted in ``left_out``."""
        by_rank = [self._of_rank(rank, left_out) for rank in sorted(self.by_rank)]
        return heapq.merge(*by_rank, key=lambda group: group["step"])

    def _of_rank(self, rank: int, left_out: Counter[str]) -> Iterator[Row]:
        for at in self.by_rank[rank]:
            try:
                self.folder.check(at)
                for group in self.folder.each_group(at):
                    if group is not None and isinstance(group.get("step"), int):
                        yield group
                    else:
                        left_out[UNREADABLE] += 1
            except FileNotFoundError:
                left_out["steps whose file was removed meanwhile"] += 1
            except ValueError:
                left_out["steps that are damaged"] += 1
