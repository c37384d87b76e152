"""What several runs have answered to the same prompts, at the last step at which each had them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.group import Completion, Group, Message
from online_dpo.dashboard.word_difference import Segment, word_difference

PATIENCE = 0.1


@dataclass(frozen=True)
class Answer:
    """A run's answer to a prompt, and where its text differs from that of the first run."""

    run: Run
    group: Group
    completion: Completion
    words: Sequence[Segment]


@dataclass(frozen=True)
class SamePrompt:
    """A prompt that several runs have answered."""

    prompt: Sequence[Message]
    answers: Sequence[Answer]


def same_prompts(runs: Sequence[Run], count: int) -> tuple[list[SamePrompt], int, int]:
    """The prompts that all runs have answered, those of the first run's last steps first: at most so many, and how many
    there are. The last number is the percentage of the groups that were looked through.
    """
    last: list[dict[str, tuple[int, int]]] = []
    percent = 100
    for run in runs:
        run.index.refresh_samples(PATIENCE / len(runs))
        percent = min(percent, run.index.progress.percent)
        with run.index.reading() as db:
            # SQLite takes the other columns from the row that has the maximum. All of them are in the table's index
            found = db.execute("SELECT prompt_key, max(step) AS step, id FROM sample GROUP BY prompt_key")
            last.append({row["prompt_key"]: (row["step"], row["id"]) for row in found})
    common = set.intersection(*(set(of_run) for of_run in last)) if last else set()
    newest = sorted(common, key=lambda key: last[0][key], reverse=True)[:count]
    shown = [_answers(runs, [of_run[key][1] for of_run in last]) for key in newest]
    return [prompt for prompt in shown if prompt is not None], len(common), percent


def _answers(runs: Sequence[Run], samples: Sequence[int]) -> SamePrompt | None:
    groups = [run.index.group(sample) for run, sample in zip(runs, samples, strict=True)]
    there = [group for group in groups if group is not None and group.completions]
    if len(there) < len(runs):  # the files were removed a moment ago
        return None
    texts = [best(group) for group in there]
    answers = []
    for run, group, completion in zip(runs, there, texts, strict=True):
        is_first = completion is texts[0]
        words = [Segment(completion.text, False)] if is_first else word_difference(completion.text, texts[0].text)[0]
        answers.append(Answer(run, group, completion, words))
    return SamePrompt(there[0].prompt, answers)


def best(group: Group) -> Completion:
    """The completion of a group that is chosen, else the one of the highest score, else the first."""
    if group.pairs:
        return group.completions[group.pairs[0].chosen]
    return max(group.completions, key=lambda one: (-float("inf") if one.score is None else one.score, -one.place))
