"""Writes the pairs, or all completions, of run folders as a preference dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.files import replacing
from online_dpo.runs.export.files import FORMATS, Format
from online_dpo.runs.export.rows import MakeRows
from online_dpo.runs.export.sources import UNREADABLE, Source
from online_dpo.runs.votes import votes_as_pairs, votes_of

Row = dict[str, Any]
ROWS_AT_ONCE = 500
ALWAYS = ("prompt", "chosen", "rejected", "completion", "response_a", "response_b", "label", "step", "row", "id")
"""Columns that are written even where no row has a value; others, such as the scores where a judge gives none, are
left out then.
"""


@dataclass
class Exported:
    """What an export has written, and what it has left out, by reason.

    >>> Exported(rows=480, groups=512, left_out=Counter({"groups without a pair: tie (all scores are equal)": 32}))

    ``torn`` are bytes at the ends of files that are no whole step, since a run writes there or was killed.
    """

    rows: int = 0
    groups: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    torn: int = 0


RowsOf = Callable[[Exported], Iterator[Row]]
"""Makes the rows anew whenever it is called, and counts into what it is given."""


@dataclass(frozen=True)
class Dataset:
    """The rows that folders give.

    Args:
        sources: the folders.
        make_rows: gives the rows of a group.
        has_step: whether a step is exported.
    """

    sources: Sequence[Source]
    make_rows: MakeRows
    has_step: Callable[[int], bool]

    def rows(self, told: Exported) -> Iterator[Row]:
        """The rows by run and step; ``told`` gets the counts."""
        for source in self.sources:
            told.torn += source.torn
            for group in source.groups(told.left_out):
                for row in self._of_group(group, told):
                    yield (
                        row
                        if len(self.sources) == 1
                        else row | {"id": f"{source.name}/{row['id']}", "run": source.name}
                    )

    def _of_group(self, group: Row, told: Exported) -> list[Row]:
        try:
            if not self.has_step(group["step"]):
                told.left_out["groups of other steps"] += 1
                return []
            told.groups += 1
            return list(self.make_rows(group, told.left_out))
        except (AttributeError, IndexError, KeyError, TypeError):  # written by others, or by another version
            told.left_out[UNREADABLE] += 1
            return []


def vote_rows(sources: Sequence[Source], told: Exported) -> Iterator[Row]:
    """People's votes as `online-dpo judge` reads them."""
    for source in sources:
        found = votes_as_pairs(source.folder.path)
        told.left_out["questions that were skipped"] += len(votes_of(source.folder.path)) - len(found)
        yield from found if len(sources) == 1 else (row | {"run": source.name} for row in found)


def sources_of(folders: Sequence[Path]) -> list[Source]:
    """Open run folders; their names are those of the folders, or the whole paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [Source.open(folder, name if unique else str(folder)) for folder, name in zip(folders, names, strict=True)]


def export(rows_of: RowsOf, to: Path) -> Exported:
    """Write rows, all of them or no file at all. They are made twice, and never all held at once.

    Raises:
        ValueError: there is no row, or the rows do not fit into one file.
        OSError: the file cannot be written.
    """
    kind, told = FORMATS[to.suffix](), Exported()
    columns = _look(rows_of, kind, told)
    if not told.rows:
        raise ValueError("there is nothing to export." + "".join(f"\n  {line}" for line in left_out_lines(told)))
    with replacing(to) as aside, kind.writing(aside, columns) as write:
        for rows in _pieces(rows_of(Exported())):
            write([{name: row.get(name) for name in columns} for row in rows])
    return told


def left_out_lines(told: Exported) -> list[str]:
    """What was left out, in a line for each reason, the most frequent first."""
    lines = [f"left out: {count:,} {reason}" for reason, count in told.left_out.most_common() if count]
    torn = f"not there yet: {told.torn:,} bytes at the end of a file that are no whole step"
    return [*lines, *([torn] if told.torn else [])]


def _look(rows_of: RowsOf, kind: Format, told: Exported) -> list[str]:
    """Find the columns that have values.

    Raises:
        ValueError: some prompts are texts and some are conversations.
    """
    columns: dict[str, bool] = {}
    runs_by_type: dict[type, str] = {}
    for rows in _pieces(rows_of(told)):
        told.rows += len(rows)
        kind.look(rows)
        for row in rows:
            runs_by_type.setdefault(type(row["prompt"]), str(row.get("run", "the run")))
            for name, value in row.items():
                columns[name] = columns.get(name, False) or value is not None
    if len(runs_by_type) > 1:
        which = f"texts in {runs_by_type[str]} and conversations in {runs_by_type[list]}"
        raise ValueError(
            f"prompts are {which}; a dataset has one of the two. Export the folders into files of their own."
        )
    return [name for name, has_value in columns.items() if has_value or name in ALWAYS]


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while piece := list(islice(rows, ROWS_AT_ONCE)):
        yield piece
