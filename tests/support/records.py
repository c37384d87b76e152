"""Run folders with a record of known content, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from online_dpo.runs import frames
from online_dpo.runs.layout import ENVIRONMENT, EVENTS, METRICS, SETTINGS, CompletionsFile

Row = dict[str, Any]


def completion(text: str, score: float | None = None, **more: Any) -> Row:
    """A completion with one token a word, scored by `words` alone."""
    row = {"text": text, "length": len(text.split()), "finish": "stop", "author": "policy", "version": 0}
    rewards = {} if score is None else {"rewards": {"words": score}, "weighted": {"words": score}, "score": score}
    return row | rewards | more


def group(step: int, completions: list[Row], pairs: Iterable[tuple[int, int]] = ((0, 1),), **more: Any) -> Row:
    """A group whose ``pairs`` are (chosen, rejected)."""
    row = {"step": step, "rank": 0, "index": 0, "round": 0, "prompt": f"Prompt {step}?", "prompt_row": step}
    row |= {"prompt_length": 2, "prompt_cut": False, "completions": completions} | more
    made = [{"chosen": c, "rejected": r, "probability": 1.0, "margin": _margin(completions, c, r)} for c, r in pairs]
    return row | ({"pairs": made} if made else {})


def write(
    folder: Path,
    groups: Iterable[Row] = (),
    metrics: Iterable[Row] = (),
    events: Iterable[Row] = (),
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the record of a run; a file without content is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, of_rank in groupby(sorted(groups, key=lambda g: (g["rank"], g["step"])), key=lambda g: g["rank"]):
        steps = [list(of_step) for _, of_step in groupby(of_rank, key=lambda g: g["step"])]
        (folder / CompletionsFile(rank, 0).name).write_bytes(b"".join(map(frames.encode, steps)))
    for name, rows in ((METRICS, list(metrics)), (EVENTS, list(events))):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in ((SETTINGS, settings), (ENVIRONMENT, environment)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def _margin(completions: list[Row], chosen: int, rejected: int) -> float | None:
    scores = [completions[place].get("score") for place in (chosen, rejected)]
    return None if None in scores else scores[0] - scores[1]
