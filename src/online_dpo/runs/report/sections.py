"""The sections of a report: what each says of a run. A section about what the run did not have is left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from online_dpo.runs.reasons import REASONS
from online_dpo.runs.report import pictures
from online_dpo.runs.report.charts import bar_chart, short
from online_dpo.runs.report.facts import RunFacts, to_look_into
from online_dpo.runs.report.pictures import Figure
from online_dpo.runs.report.text import differing, seen


@dataclass(frozen=True)
class Tile:
    """One of the figures at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; numbers are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Column:
    """An answer with what stands above it; its prompt where that is not shared."""

    note: str
    prompt: str
    text: Markup


@dataclass(frozen=True)
class Answers:
    """Early and late answers, with the words marked that differ."""

    prompt: str
    columns: Sequence[Column]


@dataclass
class Section:
    """A part of the page under a heading."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)

    @property
    def has_content(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.text or self.figures or self.tables or self.answers)


def sections(facts: RunFacts) -> Iterator[Section]:
    """The sections that have content, in the order of the page."""
    made = (
        Section(
            "course",
            "Course of the run",
            figures=[*_given(pictures.reward_against_kl(facts)), *pictures.over_steps(facts)],
        ),
        _win_rates(facts),
        _answers(facts),
        _length(facts),
        _pairs(facts),
        _judge(facts),
        _votes(facts),
        _time(facts),
        _events(facts),
        _settings(facts),
    )
    return (section for section in made if section.has_content)


def tiles(facts: RunFacts) -> Iterator[Tile]:
    """The figures at the head of the page."""
    yield Tile("steps", f"{facts.steps:,}", f"of {most:,}" if (most := _whole(facts.settings.get("max_steps"))) else "")
    for name, label in (("objective/scores", "reward"), ("completions/mean_length", "answer length, tokens")):
        if (series := facts.metrics.get(name)) is not None:
            first, last = series.ends
            yield Tile(label, short(last), f"from {short(first)}; means of the last and the first tenth of the logs")
    if (series := facts.metrics.get("objective/kl")) is not None:
        yield Tile("KL to the reference", f"{short(series.ends[1])} nats", "mean of the last tenth of the logs")
    for data, figures in facts.metrics.evaluations.items():
        for name, label in (("win_rate", "win rate"), ("gold_win_rate", "gold win rate")):
            if name in figures and len(figures[name].value):
                figure = figures[name]
                low, high = (series.last if len(series) else None for series in (figure.low, figure.high))
                yield Tile(f"{label}, {data}", f"{figure.value.last:.1%}", _interval(low, high))
    if facts.pairs is not None:
        yield Tile(
            "pairs trained on",
            f"{facts.pairs:,.0f}",
            f"{sum(facts.dropped.values()):,.0f} of {facts.prompts:,.0f} prompts gave none",
        )
    if (series := facts.metrics.get("perf/tokens_per_second")) is not None:
        yield Tile("sampled tokens a second", short(series.total / len(series)), "mean over the logs")


def _win_rates(facts: RunFacts) -> Section:
    section = Section("win-rates", "Win rates", figures=list(pictures.win_rates(facts)))
    rows = [
        {
            "file": one.file,
            "model": one.model,
            "against": one.against,
            "prompts": "" if one.prompts is None else f"{one.prompts:,}",
            "scored by": one.scored_by,
            "win rate": f"{one.value:.1%}",
            "interval": _interval(one.low, one.high),
        }
        for one in facts.comparisons
    ]
    head = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    if rows:
        cells = [[row[name] for name in head] for row in rows]
        section.tables = [Table(head, cells, "Measured apart from the run; the files lie in its folder.")]
    return section


def _answers(facts: RunFacts) -> Section:
    section = Section("answers", "Answers, early and late")
    for example in facts.examples:
        early, late = example.early, example.late
        texts = seen(early.text), seen(late.text)
        marked = differing(*texts) if example.is_same_prompt else (escape(texts[0]), escape(texts[1]))
        above = ("", "") if example.is_same_prompt else (seen(early.prompt), seen(late.prompt))
        columns = [
            Column(f"step {one.step}" + ("" if one.score is None else f", score {short(one.score)}"), prompt, text)
            for one, prompt, text in zip((early, late), above, marked, strict=True)
        ]
        section.answers.append(Answers(seen(early.prompt) if example.is_same_prompt else "", columns))
    if not facts.examples:
        return section
    if facts.examples[0].is_same_prompt:
        section.text.append("Prompts that were answered farthest apart. Words that the other answer lacks are marked.")
    else:
        section.text.append("No prompt was answered twice: these are prompts of the first and of the last steps.")
    section.text.append("Each answer is the first sampled one, not the best.")
    return section


def _length(facts: RunFacts) -> Section:
    section = Section("length", "Reward and length", figures=_given(pictures.reward_against_length(facts)))
    groups = facts.groups
    if groups.correlation is not None:
        text = (
            f"Correlation of length and score over {len(groups.scores):,} recorded answers: {groups.correlation:+.2f}."
        )
        if groups.correlation_within is not None:
            text += f" Among the answers to one prompt, which is what pairs teach: {groups.correlation_within:+.2f}."
        section.text.append(text)
    if total := groups.longer_chosen.total():
        section.text.append(
            f"The chosen answer was the longer one in {groups.longer_chosen['longer'] / total:.0%} of the pairs, the "
            f"shorter one in {groups.longer_chosen['shorter'] / total:.0%}."
        )
    return section


def _pairs(facts: RunFacts) -> Section:
    groups = facts.groups
    figures = _given(pictures.why_no_pair(facts), pictures.margins(facts))
    section = Section("pairs", "Quality of the pairs", figures=figures)
    if groups.groups:
        section.text.append(f"{groups.groups:,} groups are recorded, {len(groups.with_pairs):,} of them gave pairs.")
    if groups.accuracy is not None:
        section.text.append(
            "Before the update, the policy's own implied reward was higher for the chosen answer in "
            f"{groups.accuracy:.1%} of {len(groups.implied):,} pairs."
        )
    if facts.dropped:
        rows = [
            (name, REASONS.get(name, ""), f"{count:,.0f}", f"{count / facts.prompts:.1%}")
            for name, count in facts.dropped.items()
        ]
        section.tables = [Table(("reason", "meaning", "prompts", "share"), rows, "Prompts without a pair.")]
    return section


def _judge(facts: RunFacts) -> Section:
    section, judged = Section("judge", "The judge"), facts.groups.judged
    if not judged.comparisons:
        return section
    rows = [("comparisons recorded", f"{judged.comparisons:,}"), ("questions", f"{judged.orders:,}")]
    if judged.orders:
        rows.append(("questions without an answer", f"{judged.unanswered:,} ({judged.unanswered / judged.orders:.1%})"))
    if judged.position_bias is not None and judged.disagreement is not None:
        rows.append(("probability given to the answer shown first", f"{judged.position_bias:.3f} (fair: 0.5)"))
        rows.append(("comparisons whose two orders disagree", f"{judged.disagreed:,} ({judged.disagreement:.1%})"))
    for name, value in (("tokens", judged.tokens), ("seconds of waiting", judged.seconds), ("cost", judged.cost)):
        if value:
            rows.append((name, short(value)))
    section.tables = [Table(("", "value"), rows)]
    if judged.words:
        words = [(seen(text, 400),) for text in judged.words]
        section.tables.append(Table(("what it wrote, for example",), words))
    return section


def _votes(facts: RunFacts) -> Section:
    section = Section("votes", "People's votes")
    if not facts.votes:
        return section
    choices = Counter(vote.choice for vote in facts.votes)
    section.text = [
        f"{len(facts.votes):,} questions have a vote: {choices['tie']:,} are ties, {choices['skip']:,} were skipped."
    ]
    rows = [
        (one.name, one.kind, f"{one.agreed:,} of {one.compared:,}", f"{one.share:.1%}", _interval(*one.interval))
        for one in facts.agreements
    ]
    if rows:
        head = ("who", "kind", "agrees", "share", "interval")
        section.tables = [Table(head, rows, "Agreement with blind votes whose answers are still recorded.")]
    return section


def _time(facts: RunFacts) -> Section:
    section = Section("time", "Time and memory")
    if seconds := facts.seconds:
        chart = bar_chart(dict(sorted(seconds.items(), key=lambda part: -part[1])), "s", "Seconds by phase")
        section.figures.append(Figure("Time by phase", chart, "Mean over ranks, without evaluations."))
    section.figures += _given(pictures.memory(facts))
    return section


def _events(facts: RunFacts) -> Section:
    section = Section("events", "What was skipped, retried or warned about")
    kinds = to_look_into(facts.events)
    if kinds:
        rows = [
            (
                kind.kind,
                f"{kind.count:,}",
                f"{kind.first}–{kind.last}" if kind.count > 1 else f"{kind.first}",
                seen(kind.message, 400),
            )
            for kind in kinds
        ]
        section.tables = [Table(("kind", "times", "steps", "the last one"), rows)]
    elif facts.events:
        section.text = ["Nothing."]
    return section


def _settings(facts: RunFacts) -> Section:
    section = Section("settings", "Settings and versions")
    if facts.settings:
        named = {**facts.parts, **facts.settings}
        rows = [(str(name), seen(str(value), 300)) for name, value in named.items()]
        section.tables.append(Table(("setting", "value"), rows, "What differs from the defaults, and the paths."))
    if facts.sessions:
        section.tables.append(
            Table(("", "last session"), list(_session(facts.sessions[-1])), f"Sessions: {len(facts.sessions)}.")
        )
    return section


def _session(session: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in session.items():
        if value is None:
            continue
        if name == "versions" and isinstance(value, dict):
            text = ", ".join(f"{package} {number}" for package, number in value.items())
        elif name == "devices" and isinstance(value, list):
            text = ", ".join(
                str(device.get("name", device)) if isinstance(device, dict) else str(device) for device in value
            )
        elif name in ("started", "start") and isinstance(value, (int, float)):
            text = moment(value)
        elif name == "memory" and isinstance(value, int):
            text = f"{value / 2**30:.1f} GiB"
        elif name == "git" and isinstance(value, dict):
            text = f"{value.get('commit')}{', changed since' if value.get('dirty') else ''}"
        else:
            text = str(value)
        yield name, seen(text, 600)


def moment(seconds: float) -> str:
    """A time since 1970 for people, in UTC.

    >>> moment(1764160000.0)
    '2025-11-26 12:26 UTC'
    """
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(seconds, 0), 253402300799)))


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.1%} to {high:.1%}"


def _given(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
