"""Groups in the index: what is filtered and sorted by, one row of table ``sample`` a group."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from statistics import fmean

from online_dpo.dashboard.group import Comparison, Completion, Group, Pair

LONGEST_TEXT = 1 << 18
"""Characters of a group that are searched."""

BEGINNING = 200
"""Characters of a text that lists show."""


def add_group(db: sqlite3.Connection, frame: int, place: int, group: Group) -> None:
    """Add a group to the index; ``frame`` and ``place`` say where its JSON is."""
    row = {"frame": frame, "place": place, **_identity(group), **_facts(group)}
    names, marks = ", ".join(row), ", ".join("?" * len(row))
    sample = db.execute(f"INSERT INTO sample ({names}) VALUES ({marks})", list(row.values())).lastrowid  # nosec B608
    db.executemany("INSERT INTO reward VALUES (?, ?, ?, ?)", _rewards(sample or 0, group))
    for number, comparison in enumerate(group.comparisons):
        db.executemany(
            f"INSERT INTO judged VALUES ({', '.join('?' * 16)})",  # nosec B608
            _judged(sample or 0, group.step, number, comparison),
        )


def search_text(text: str) -> str:
    """Text in the form in which it is searched: without differences of upper and lower case."""
    return text.casefold()


def _identity(group: Group) -> dict[str, object]:
    return {
        **{"step": group.step, "rank": group.rank, "idx": group.index, "round": group.round},
        **{"prompt_row": group.prompt_row, "prompt_key": group.prompt_key, "completions": len(group.completions)},
    }


def _facts(group: Group) -> dict[str, object]:
    lengths = [completion.length for completion in group.completions]
    scores = [completion.score for completion in group.completions]
    texts = [group.prompt_text, *(completion.text for completion in group.completions)]
    return {
        **{"pairs": len(group.pairs), "reason": group.reason or None, "margin": largest(p.margin for p in group.pairs)},
        "probability": largest(pair.probability for pair in group.pairs),
        "length_ratio": largest(length_ratio(pair, group.completions) for pair in group.pairs),
        "surprise": largest(pair.surprise for pair in group.pairs),
        "disagreement": largest(comparison.disagreement for comparison in group.comparisons),
        **{"mean_length": _mean(lengths), "mean_score": _mean(scores), "best_score": largest(scores)},
        **{"scorers": json.dumps(group.scorers), "comparisons": len(group.comparisons)},
        "text": search_text("\n".join(texts)[:LONGEST_TEXT]),
        **_beginnings(group),
    }


def _beginnings(group: Group) -> dict[str, str]:
    """The beginnings of the prompt, and of the first pair's completions; without a pair, of the first two."""
    texts = [completion.text for completion in group.completions]
    pair = (group.pairs[0].chosen, group.pairs[0].rejected) if group.pairs else (0, 1)
    chosen, rejected = (texts[place] if place < len(texts) else "" for place in pair)
    last = group.prompt[-1].content if group.prompt else ""
    of = {"prompt": last, "chosen": chosen, "rejected": rejected}
    return {name: " ".join(text[: 4 * BEGINNING].split())[:BEGINNING] for name, text in of.items()}


def _rewards(sample: int, group: Group) -> Iterator[tuple[object, ...]]:
    for name in group.scorers:
        numbers = [completion.rewards.get(name) for completion in group.completions]
        there = [number for number in numbers if number is not None]
        if there:
            yield sample, name, min(there), max(there)


def largest(numbers: Iterator[float | None] | Sequence[float | None]) -> float | None:
    """The largest of the numbers that are there."""
    return max((number for number in numbers if number is not None), default=None)


def length_ratio(pair: Pair, completions: Sequence[Completion]) -> float | None:
    """The length of the chosen completion over that of the rejected one."""
    chosen, rejected = completions[pair.chosen].length, completions[pair.rejected].length
    return chosen / rejected if chosen is not None and rejected else None


def _mean(numbers: Sequence[float | None]) -> float | None:
    there = [number for number in numbers if number is not None]
    return fmean(there) if there else None


def _judged(sample: int, step: int, number: int, comparison: Comparison) -> Iterator[tuple[object, ...]]:
    for place, order in enumerate(comparison.orders):
        yield (
            *(sample, step, number, place, comparison.first, comparison.second, order.shown[0]),
            *(order.probability, comparison.probability, comparison.disagreement),
            *(order.seconds, order.tokens, order.cost, int(order.probability is None), int(order.cached)),
            search_text(f"{order.words}\n{order.failure}"[:LONGEST_TEXT]),
        )
