"""Lengths of the prompts against the limits of the run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

from datasets import Dataset, IterableDataset

from online_dpo.data.prompts import prepare_prompts
from online_dpo.doctor.case import STREAM_ROWS, Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check

MEASURED = 2000
"""Rows whose whole length is measured, from all over the dataset."""
BINS, WIDTH = 6, 24
FEW, MANY = 0.05, 0.5
"""Shares of prompts that may be cut without a word, and above which the limit is a mistake."""


@check("prompts")
def prompts(case: Case) -> Iterator[Finding]:
    """Prompts that cannot be used, that are cut, or that leave no room for an answer."""
    dataset, dropped = case.dataset, sum(case.dropped.values())
    yield from _unusable(len(dataset), case.dropped)
    lengths = whole_lengths(case)
    limit, room = case.args.prompt_limit, case.config.get_text_config()
    most = getattr(room, "max_position_embeddings", None)
    lines = tuple(histogram(lengths, limit)) if len(set(lengths)) > 1 else ()
    cut = share(length > limit for length in lengths) if limit is not None else 0.0
    facts = {"rows": len(dataset), "dropped": dropped, "cut": cut, "longest": max(lengths), "limit": limit}
    found = f"{len(dataset)} prompts of {min(lengths)} to {max(lengths)} tokens"
    if limit is not None and cut > FEW:
        text = f"{found}: {cut:.0%} are longer than {limit} tokens, and lose their beginning"
        change = "Raise `max_length` (or `max_prompt_length`), or leave long prompts out of the dataset."
        yield (problem if cut > MANY else warning)(text, change, lines=lines, **facts)
        return
    if most and limit is not None and limit + case.args.max_new_tokens > most:
        yield problem(
            f"{found}; with {limit} of a prompt and {case.args.max_new_tokens} new tokens they may have more than the "
            f"model's {most}",
            f"Set `max_length` to at most {most}.",
            lines=lines,
            **facts,
        )
        return
    full = share(length + case.args.max_new_tokens > most for length in lengths) if most and limit is None else 0.0
    if full:
        yield problem(
            f"{found}: {full:.0%} leave no room for {case.args.max_new_tokens} new tokens in the model's {most}",
            "Set `max_length` to at most the model's length, so that long prompts are cut.",
            lines=lines,
            **facts,
        )
        return
    yield ok(found + (f"; {cut:.1%} are cut to {limit}" if cut else ""), lines=lines, **facts)


def _unusable(usable: int, counts: Mapping[str, int]) -> Iterator[Finding]:
    lost = sum(counts.values())
    if not lost:
        return
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.items())
    part = lost / (lost + usable)
    text = f"{part:.0%} of the rows are left out: {reasons}"
    change = "Mend these rows, or the settings that read them (`prompt_column`, `max_length`)."
    yield (problem if part > MANY else warning)(text, change, dropped=dict(counts))


def whole_lengths(case: Case) -> list[int]:
    """Returns the lengths of prompts before they are cut, in tokens."""
    rows = case.rows
    if isinstance(rows, IterableDataset):
        rows = list(rows.take(STREAM_ROWS))
    elif len(rows) > MEASURED:
        rows = rows.select(range(0, len(rows), -(-len(rows) // MEASURED)))
    args = copy.copy(case.args)
    args.max_length = args.max_prompt_length = None
    args.invalid_prompts = "filter"
    with case.quietly():
        prepared, _ = prepare_prompts(rows, case.tokenizer, args, name="the prompts")
    assert isinstance(prepared, Dataset)
    return [len(ids) for ids in prepared["prompt_ids"][:]]


def share(values: Iterable[bool]) -> float:
    """Returns the share of values that are true."""
    found = list(values)
    return sum(found) / len(found)


def histogram(lengths: Sequence[int], limit: int | None) -> Iterator[str]:
    """Yields the lines of a histogram of lengths, with a mark where the limit lies."""
    lowest, highest = min(lengths), max(lengths)
    step = max(1, -(-(highest - lowest + 1) // BINS))
    bins = [0] * BINS
    for length in lengths:
        bins[(length - lowest) // step] += 1
    for number, count in enumerate(bins):
        first, last = lowest + number * step, lowest + (number + 1) * step - 1
        if first > highest:
            return
        bar = "#" * round(WIDTH * count / max(bins)) or ("." if count else "")
        mark = " <- limit" if limit is not None and first <= limit <= last else ""
        yield f"{first:>6} to {last:<6} {bar:<{WIDTH}} {count}{mark}"
