"""The facts of a run, read from its folder once: the page and the model card say them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from online_dpo.runs.agreement import Agreement, agreements
from online_dpo.runs.layout import EARLIER, ENVIRONMENT, EVENTS, METRICS, SETTINGS, SETTINGS_BESIDE, completions_files
from online_dpo.runs.opening import read_small
from online_dpo.runs.plain_json import number
from online_dpo.runs.reading import LARGEST_SETTINGS, Lines, RunFolder, StepFrame
from online_dpo.runs.report.groups import GroupFacts, collect_groups, is_by_policy
from online_dpo.runs.report.series import Metrics, collect
from online_dpo.runs.state import state_from
from online_dpo.runs.votes import Vote, latest_votes

Row = dict[str, Any]

PHASES = ("rollout", "scoring", "training", "reference", "sync", "waiting")
NOT_SAVED = "checkpoint not saved"
QUIET = frozenset({"start", "resume", "end", "checkpoint", "evaluation", "sync"})
"""Kinds of events that are the course of a run, and nothing to look into."""
LARGEST_FIGURES = 1 << 20
"""Bytes of a file of figures that is read."""
EXAMPLES = 4
PIECE = 1 << 20
"""Bytes of a file of rows that are read at once."""


@dataclass
class EventKind:
    """The events of a kind: how many, the first and the last step, and the last message.

    >>> EventKind("skip", count=2, first=12, last=40, message="Step 40 skipped: its loss is not finite.")
    """

    kind: str
    count: int = 0
    first: int = 0
    last: int = 0
    message: str = ""


@dataclass(frozen=True)
class Answered:
    """The first sampled answer to a prompt, and its score.

    >>> Answered(step=90, prompt="Name a colour.", text="Red, please.", score=0.9)
    """

    step: int
    prompt: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Example:
    """An answer early in the run and one late, to the same prompt where one was answered twice."""

    early: Answered
    late: Answered

    @property
    def is_same_prompt(self) -> bool:
        """Whether both answer the same prompt."""
        return self.early.prompt == self.late.prompt


@dataclass(frozen=True)
class Comparison:
    """A win rate that stands in a file of figures beside the record.

    >>> Comparison("figures.json", "runs/a", "start/policy", 500, "rubric", value=0.93, low=0.91, high=0.95)
    """

    file: str
    model: str
    against: str
    prompts: int | None
    scored_by: str
    value: float
    low: float | None
    high: float | None


@dataclass
class RunFacts:
    """What is known of a run.

    ``parts`` are models and feedback in words, where the settings do not have them. ``state`` is that of
    `online_dpo.runs.state`; ``end`` says how it ended. ``votes`` are people's, one for each question; ``agreements``
    say who agrees with them. ``missing`` says what is not in the folder.
    """

    name: str
    settings: Row
    parts: dict[str, str]
    sessions: list[Row]
    metrics: Metrics
    groups: GroupFacts
    events: list[EventKind]
    state: str
    end: str
    examples: list[Example] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    earlier: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        return max(self.metrics.steps, self.groups.last_step)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, the reference apart from training; empty where none were logged. "other" has the phases of
        less than a thousandth as well.
        """
        times = {name: series.total for name, series in self.metrics.starting("time/").items() if "/" not in name}
        whole = times.get("all")
        found = {name: times[name] for name in PHASES if times.get(name)}
        if "reference" in found and "training" in found:
            found["training"] = max(0.0, found["training"] - found["reference"])
        if whole is not None:
            found = {name: seconds for name, seconds in found.items() if seconds >= whole / 1000}
            if (rest := whole - sum(found.values())) > 0:
                found["other"] = rest
        return found

    @property
    def dropped(self) -> dict[str, float]:
        """Groups without a pair by reason, most frequent first: of all that were sampled where metrics say it, else of
        those that are recorded.
        """
        counted = {name: series.total for name, series in self.metrics.starting("dropped/").items() if series.total}
        recorded = {name: float(len(steps)) for name, steps in self.groups.reasons.items()}
        chosen = counted if self.metrics.logs else recorded
        return dict(sorted(chosen.items(), key=lambda entry: -entry[1]))

    @property
    def prompts(self) -> float:
        """How many prompts were answered: those of the metrics, else those that are recorded."""
        series = self.metrics.get("prompts")
        counted = 0.0 if series is None else series.total
        return max(counted or self.groups.groups, sum(self.dropped.values()))

    @property
    def pairs(self) -> float | None:
        """The number of pairs trained on."""
        series = self.metrics.get("pairs/count")
        return series.total if series is not None else None


def facts_of(path: Path, *, with_samples: bool = True) -> RunFacts:
    """Read the record in a folder. What is not there is named in ``missing``.

    Without ``with_samples``, completions are not read: they may be gigabytes.
    """
    folder = RunFolder(path)
    kinds, end = _events(folder)
    votes = list(latest_votes(each_row(folder.votes)).values())
    voted = {vote.group for vote in votes if vote.group is not None}
    groups = collect_groups(folder, voted) if with_samples else GroupFacts()
    sessions = folder.environment.get("sessions", [])
    facts = RunFacts(
        name=path.resolve().name,
        settings=folder.settings,
        parts=_parts(path),
        sessions=[session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else [],
        metrics=collect(each_row(folder.metrics)),
        groups=groups,
        events=kinds,
        state=state_from(each_row(folder.events), path),
        end=end,
        examples=list(_examples(folder, groups)),
        comparisons=list(_comparisons(path)),
        votes=votes,
        agreements=agreements(votes, lambda vote: groups.kept.get(vote.group or "")),
        earlier=sum(child.is_dir() for child in (path / EARLIER).iterdir()) if (path / EARLIER).is_dir() else 0,
    )
    facts.missing = list(_missing(path, facts))
    return facts


def each_row(read: Callable[[int, int], Lines]) -> Iterator[Row]:
    """The rows of a file, one by one: ``read`` reads some bytes of it from a byte on."""
    start = 0
    while (lines := read(start, PIECE)).end > start:
        yield from lines.rows
        start = lines.end


def _parts(path: Path) -> dict[str, str]:
    """The models and the feedback of a run that was started in Python: comments at the head of its settings."""
    for name in (SETTINGS_BESIDE, SETTINGS):
        try:
            text = read_small(path / name, LARGEST_SETTINGS).decode("utf-8", "replace")
        except (OSError, ValueError):
            continue
        return dict(re.findall(r"^# (model|reference|feedback): (.+)$", text, flags=re.MULTILINE))
    return {}


def _events(folder: RunFolder) -> tuple[list[EventKind], str]:
    """The events by kind, and what the first process said at the end of the run, or else another one."""
    kinds: dict[str, EventKind] = {}
    ends: dict[Any, str] = {}
    for row in each_row(folder.events):
        name = NOT_SAVED if row.get("saved") is False else str(row.get("kind", ""))
        step, times = int(number(row.get("step")) or 0), int(number(row.get("times")) or 1)
        kind = kinds.setdefault(name, EventKind(name, first=step))
        kind.count, kind.last, kind.message = kind.count + times, step, str(row.get("message", ""))
        if name == "start":
            ends = {}
        elif name == "end":
            ends[row.get("rank", 0)] = kind.message
    return list(kinds.values()), ends.get(0) or next(iter(ends.values()), "")


def _examples(folder: RunFolder, groups: GroupFacts) -> Iterator[Example]:
    """Answers to the prompts whose first and last answers are the farthest apart, by step. Where no prompt was answered
    twice: to prompts of the first and of the last steps.
    """
    seen = sorted(groups.prompts.values(), key=lambda one: (one.first_step - one.last_step, one.first_step))
    apart = [(one.first, one.last) for one in seen[:EXAMPLES] if one.last_step > one.first_step]
    if not apart and seen and seen[0].first_step < seen[-1].first_step:
        count = min(EXAMPLES, len(seen) // 2)
        apart = [(early.first, late.first) for early, late in zip(seen[:count], seen[-count:], strict=True)]
    for early, late in apart:
        with suppress(FileNotFoundError):  # rotated out meanwhile
            yield Example(_answered(folder, *early), _answered(folder, *late))


def _answered(folder: RunFolder, at: StepFrame, place: int) -> Answered:
    group = next(islice(folder.each_group(at), place, None))
    assert group is not None, "it was read before"
    answer = next(completion for completion in group["completions"] if is_by_policy(completion))
    return Answered(group["step"], prompt_text(group["prompt"]), str(answer["text"]), number(answer.get("score")))


def prompt_text(prompt: Any) -> str:
    """A prompt for people: a text as it is, a conversation with the roles before the messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _comparisons(path: Path) -> Iterator[Comparison]:
    """Win rates in files of figures that `online-dpo eval --json` or the quickstart has written into the folder."""
    for file in sorted(path.glob("*.json")):
        if file.name == ENVIRONMENT or not file.is_file() or file.stat().st_size > LARGEST_FIGURES:
            continue
        try:
            figures = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(figures, dict) and (comparison := _comparison(file.name, figures)) is not None:
            yield comparison


def _comparison(file: str, figures: Row) -> Comparison | None:
    rate = figures.get("win_rate")
    if isinstance(rate, dict):
        value, low, high = (number(rate.get(name)) for name in ("value", "low", "high"))
    else:
        interval = figures.get("win_rate_ci95")
        low, high = map(number, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
        value = number(rate)
    if value is None:
        return None
    prompts = number(figures.get("prompts"))
    names = {name: str(figures.get(name, "")) for name in ("model", "against", "scored_by")}
    return Comparison(file, prompts=None if prompts is None else int(prompts), value=value, low=low, high=high, **names)


def _missing(path: Path, facts: RunFacts) -> Iterator[str]:
    if not facts.settings:
        yield f"The settings: there is no {SETTINGS}, or it cannot be read."
    if not facts.sessions:
        yield f"Versions and devices: there is no {ENVIRONMENT}, or it cannot be read."
    if not facts.metrics.logs:
        yield f"Metrics: {METRICS} is not there, has no row, or cannot be read."
    if not facts.events:
        yield f"Events: {EVENTS} is not there, has no row, or cannot be read."
    if not completions_files(path):
        yield "Samples: no completions were written (`log_completions: off`?)."
    elif facts.groups.unreadable:
        yield f"Samples: {facts.groups.unreadable} groups or steps could not be read."


def to_look_into(events: Sequence[EventKind]) -> list[EventKind]:
    """The events that are not just the course of a run, the most frequent first."""
    return sorted((kind for kind in events if kind.kind not in QUIET), key=lambda kind: -kind.count)
