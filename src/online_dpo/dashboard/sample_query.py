"""What a page of samples shows and in which order: read from its address, and written into SQL and into links."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from online_dpo.dashboard.index.samples import search_text

RANGES = {
    "step": "step",
    "margin": "margin",
    "ratio": "length_ratio",
    "surprise": "surprise",
    "disagreement": "disagreement",
}
"""Names in addresses and columns of table ``sample`` of what is filtered by a smallest and a largest value."""

SORTS = {
    "step": ("Step, first first", "step, rank, idx, round"),
    "-step": ("Step, last first", "step DESC, rank, idx, round"),
    "-surprise": ("Surprise, largest first", "surprise IS NULL, surprise DESC, id"),
    "-margin": ("Margin, largest first", "margin IS NULL, margin DESC, id"),
    "margin": ("Margin, smallest first", "margin IS NULL, margin, id"),
    "-disagreement": ("Judge's disagreement, largest first", "disagreement IS NULL, disagreement DESC, id"),
    "-ratio": ("Length ratio, largest first", "length_ratio IS NULL, length_ratio DESC, id"),
    "ratio": ("Length ratio, smallest first", "length_ratio IS NULL, length_ratio, id"),
}
"""Names in addresses, what they are called, and their SQL."""

_IN_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
"""A number as the pages write it: 1,200. Another comma stands before decimals."""

PAIRED, UNPAIRED = "paired", "unpaired"
PAGE = 50
"""Samples on a page."""


@dataclass(frozen=True)
class SampleQuery:
    """Filters and order of samples; empty texts and missing bounds let everything pass.

    ``bounds`` has smallest and largest values by the names of `RANGES`; ``scorer`` and ``score`` pass groups in which a
    completion has at least, or at most, such a reward; ``result`` is `PAIRED`, `UNPAIRED` or a reason; ``wrong`` are
    the values of the address that cannot be read.

    >>> SampleQuery.read({"step_min": "10", "sort": "-surprise"}).link()
    'sort=-surprise&step_min=10'
    """

    text: str = ""
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    result: str = ""
    scorer: str = ""
    score: tuple[float | None, float | None] = (None, None)
    prompt: str = ""
    sort: str = "step"
    page: int = 1
    wrong: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, str]) -> SampleQuery:
        """The query of an address."""
        wrong: list[str] = []
        bounds = {name: _bounds(given, name, wrong) for name in RANGES}
        page = given.get("page", "1")
        return cls(
            text=given.get("q", "").strip(),
            bounds={name: both for name, both in bounds.items() if both != (None, None)},
            result=given.get("result", ""),
            scorer=given.get("scorer", ""),
            score=_bounds(given, "score", wrong),
            prompt=given.get("prompt", ""),
            sort=given.get("sort", "step") if given.get("sort") in SORTS else "step",
            page=max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 9 else 1,
            wrong=tuple(wrong),
        )

    def bound(self, name: str, which: int) -> str:
        """A bound as it is written into a field of the form."""
        low_high = self.score if name == "score" else self.bounds.get(name, (None, None))
        value = low_high[which]
        return "" if value is None else f"{value:.10g}"

    @property
    def is_filtered(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self.text or self.bounds or self.result or self.prompt or self.score != (None, None))

    def link(self, **changes: Any) -> str:
        """The query as part of an address, with changes; what is empty or a default is left out."""
        values = {"q": self.text, "result": self.result, "scorer": self.scorer, "prompt": self.prompt}
        for name in (*RANGES, "score"):
            values |= {f"{name}_min": self.bound(name, 0), f"{name}_max": self.bound(name, 1)}
        values |= {"sort": "" if self.sort == "step" else self.sort, "page": "" if self.page == 1 else self.page}
        values |= changes
        return urlencode(sorted((name, value) for name, value in values.items() if value not in ("", None)))

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL, and its values."""
        parts: list[tuple[str, list[Any]]] = [("1", [])]
        for name, (low, high) in self.bounds.items():
            column = RANGES[name]
            parts += [(f"{column} >= ?", [low])] if low is not None else []
            parts += [(f"{column} <= ?", [high])] if high is not None else []
        if self.text:
            parts.append(("instr(text, ?) > 0", [search_text(self.text)]))
        if self.prompt:
            parts.append(("prompt_key = ?", [self.prompt]))
        if self.result in (PAIRED, UNPAIRED):
            parts.append(("pairs > 0" if self.result == PAIRED else "pairs = 0", []))
        elif self.result:
            parts.append(("reason = ?", [self.result]))
        if self.score != (None, None):
            parts.append(self._of_scorer())
        return " AND ".join(condition for condition, _ in parts), [value for _, values in parts for value in values]

    def _of_scorer(self) -> tuple[str, list[Any]]:
        low, high = self.score
        conditions, values = ["sample = s.id"], []
        if self.scorer:
            conditions, values = [*conditions, "scorer = ?"], [self.scorer]
        if low is not None:
            conditions, values = [*conditions, "highest >= ?"], [*values, low]
        if high is not None:
            conditions, values = [*conditions, "lowest <= ?"], [*values, high]
        exists = f"EXISTS (SELECT 1 FROM reward WHERE {' AND '.join(conditions)})"  # nosec B608
        return exists, values

    def count(self, db: sqlite3.Connection) -> int:
        """How many samples pass."""
        condition, values = self.where()
        return db.execute(f"SELECT count(*) FROM sample s WHERE {condition}", values).fetchone()[0]  # nosec B608

    def rows(self, db: sqlite3.Connection) -> list[sqlite3.Row]:
        """The samples of the page."""
        condition, values = self.where()
        order = SORTS[self.sort][1]
        page = f"SELECT id FROM sample s WHERE {condition} ORDER BY {order} LIMIT ? OFFSET ?"  # nosec B608
        select = f"SELECT * FROM sample WHERE id IN ({page}) ORDER BY {order}"  # nosec B608
        return db.execute(select, [*values, PAGE, PAGE * (self.page - 1)]).fetchall()

    def neighbours(self, db: sqlite3.Connection, key: str) -> Neighbours:
        """The samples before and after one, in this order."""
        condition, values = self.where()
        name = "step || '-' || rank || '-' || idx || '-' || round"
        select = f"SELECT {name} FROM sample s WHERE {condition} ORDER BY {SORTS[self.sort][1]}"  # nosec B608
        keys = [row[0] for row in db.execute(select, values)]
        if key not in keys:
            return Neighbours(None, None, None, len(keys))
        place = keys.index(key)
        after = keys[place + 1] if place + 1 < len(keys) else None
        return Neighbours(keys[place - 1] if place else None, after, place + 1, len(keys))


@dataclass(frozen=True)
class Neighbours:
    """The keys of the samples before and after one, its place, and the number of all.

    >>> Neighbours(before=None, after="1-0-1-0", place=1, count=400)
    """

    before: str | None
    after: str | None
    place: int | None
    count: int


def _bounds(given: Mapping[str, str], name: str, wrong: list[str]) -> tuple[float | None, float | None]:
    return _number(given.get(f"{name}_min", ""), wrong), _number(given.get(f"{name}_max", ""), wrong)


def _number(text: str, wrong: list[str]) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text.replace(",", "" if _IN_THOUSANDS.fullmatch(text.strip()) else "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        wrong.append(text[:40])
        return None
    return value
