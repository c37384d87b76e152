"""``online-dpo judge`` after its arguments have been checked: ask the judge, print a report, write labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from online_dpo.cli.judging.pairs_file import LabelledPair
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.terminal.progress import no_progress_bars, plain_warnings
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.errors import ScoringError, error_text
from online_dpo.evaluation.conclusions import judge_conclusion
from online_dpo.foreign import foreign
from online_dpo.scoring.judges.llm.judge import LLMJudge, stands_first
from online_dpo.scoring.judges.llm.prompts import prompt_text
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.stats.intervals import win_rate
from online_dpo.training.display.figures import number
from online_dpo.types import Completion, Group, Prompt

PAIRS_AT_ONCE = 500


@dataclass(frozen=True)
class Agreement:
    """Agreement of a judge with labels: the ``share`` of ``count`` labels and its 95 % interval.

    A preference of exactly 0.5 counts as half an agreement.
    """

    share: float
    low: float
    high: float
    count: int


@no_progress_bars()
@plain_warnings()
def judge_pairs(pairs: Sequence[LabelledPair], chosen: BuiltInJudge, output: Path | None) -> int:
    """Label the pairs and print the report. Returns the exit code: 0, 1 (judging failed) or 2 (cannot be loaded)."""
    try:
        judge = _load(chosen)
    except Exception as problem:  # libraries have their own for a file or a hub that they cannot use
        print(f"error: {error_text(problem)}", file=sys.stderr)
        return 2
    try:
        preferences = _prefer_all(judge, pairs)
    except ScoringError as problem:
        print(f"error: {error_text(problem)}", file=sys.stderr)
        return 1
    print_lines(report(judge.name, pairs, preferences, judge.metrics()))
    if output is not None:
        try:
            _write(output, judge.name, pairs, preferences)
        except OSError as problem:
            print(f"error: labels could not be written to {output}: {problem.strerror}", file=sys.stderr)
            return 1
        print(f"Labels written to {output}")
    if all(preference is None for preference in preferences):
        print(f"error: no pair has a preference. Last cause: {judge.last_failure}", file=sys.stderr)
        return 1
    return 0


def _load(chosen: BuiltInJudge) -> LLMJudge | PairwiseModelJudge:
    if chosen.folder is None:
        return LLMJudge(**chosen.options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PairwiseModelJudge.load(str(chosen.folder), device, **chosen.options)


def agreement(pairs: Sequence[LabelledPair], preferences: Sequence[float | None]) -> Agreement | None:
    """Compute the agreement over the pairs with a label and a preference; ``None`` if there are none."""
    points = [
        0.5 if preference == 0.5 else float((preference > 0.5) == (pair.label > 0.5))
        for pair, preference in zip(pairs, preferences, strict=True)
        if pair.label is not None and preference is not None
    ]
    if not points:
        return None
    return Agreement(*win_rate(points), len(points))


def report(
    name: str, pairs: Sequence[LabelledPair], preferences: Sequence[float | None], metrics: dict[str, float]
) -> list[str]:
    """The lines of the report: counts, agreement with labels, position bias, the judge's metrics, conclusions."""
    answered = sum(preference is not None for preference in preferences)
    with_labels = agreement(pairs, preferences)
    rows = {"pairs": f"{len(pairs)}, of which {answered} have a preference"}
    if with_labels is not None:
        rows["agreement with labels"] = (
            f"{with_labels.share:.3f}, 95 % interval {with_labels.low:.3f} to {with_labels.high:.3f}, "
            f"{with_labels.count} labels"
        )
    rows |= _metric_rows(metrics)
    width = max(map(len, rows))
    lines = [f"Judge {name}", *(f"  {heading:<{width}}  {text}" for heading, text in rows.items())]
    if answered == 0:
        return lines
    unanswered, bias = 1 - answered / len(pairs), metrics.get("judge/position_bias")
    return [*lines, *judge_conclusion(None if with_labels is None else asdict(with_labels), unanswered, bias)]


def _metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    rows = {}
    if "judge/position_bias" in metrics:
        rows["preference for the first place"] = f"{metrics['judge/position_bias']:.3f} (fair: 0.5)"
    if "judge/disagreement_rate" in metrics:
        rows["orders that disagree"] = f"{metrics['judge/disagreement_rate']:.3f}"
    for metric, value in metrics.items():
        if metric not in ("judge/position_bias", "judge/disagreement_rate"):
            rows[metric.removeprefix("judge/").replace("_", " ")] = number(value)
    return rows


def _prefer_all(judge: LLMJudge | PairwiseModelJudge, pairs: Sequence[LabelledPair]) -> list[float | None]:
    preferences: list[float | None] = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        preferences += _prefer(judge, pairs[start : start + PAIRS_AT_ONCE])
        if len(pairs) > PAIRS_AT_ONCE:
            print(f"{len(preferences)} of {len(pairs)}", file=sys.stderr)
    return preferences


def _prefer(judge: LLMJudge | PairwiseModelJudge, pairs: Sequence[LabelledPair]) -> list[float | None]:
    """Ask the judge for its preference for the first answers.

    If the file does not define which answer is shown first, the order depends on the texts, so that a judge with
    position bias neither gains nor loses agreement.
    """
    comparisons, swapped = [], []
    for row, pair in enumerate(pairs):
        prompt = Prompt(pair.prompt, (), row)
        swap = not pair.ordered and not stands_first(prompt_text(prompt), pair.first, pair.second)
        texts = (pair.second, pair.first) if swap else (pair.first, pair.second)
        comparisons.append(Group(prompt, tuple(Completion((), (), "stop", 0, text) for text in texts)))
        swapped.append(swap)
    with foreign(f"Judge `{judge.name}`"):
        preferences = judge.prefer(comparisons)
    return [
        1 - preference if swap and preference is not None else preference
        for preference, swap in zip(preferences, swapped, strict=True)
    ]


def _write(path: Path, name: str, pairs: Sequence[LabelledPair], preferences: Sequence[float | None]) -> None:
    # half a surrogate pair, which UTF-8 does not have, becomes what JSON writes for it
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for pair, preference in zip(pairs, preferences, strict=True):
            file.write(json.dumps({**pair.row, "preference": preference, "judge": name}, ensure_ascii=False) + "\n")
