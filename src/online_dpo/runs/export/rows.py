"""Rows of a preference dataset, made of the groups of a run: columns as TRL's trainers take them, and others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from online_dpo.runs.plain_json import number
from online_dpo.runs.reasons import in_words

Row = dict[str, Any]
MakeRows = Callable[[Row, Counter[str]], Iterator[Row]]
"""From a group to rows; the counter gets what was left out, by reason."""


@dataclass(frozen=True)
class Selection:
    """What is exported: the steps ``first`` to ``last``, both included, and pairs of at least ``min_margin``.

    >>> Selection(first=100, last=None, min_margin=0.5)
    """

    first: int = 0
    last: int | None = None
    min_margin: float | None = None

    def has_step(self, step: int) -> bool:
        """Whether a step is one of those."""
        return self.first <= step and (self.last is None or step <= self.last)

    def pair_rows(self, group: Row, left_out: Counter[str]) -> Iterator[Row]:
        """A row for each pair of a group."""
        pairs = group.get("pairs", [])
        if not pairs:
            left_out[f"groups without a pair: {in_words(group.get('reason') or 'no reason is recorded')}"] += 1
        for pair in pairs:
            margin = number(pair.get("margin"))
            if self.min_margin is None or (margin is not None and margin >= self.min_margin):
                yield _pair_row(group, pair)
            elif margin is None:
                left_out["pairs without a margin, since a judge compared them"] += 1
            else:
                left_out[f"pairs with a margin below {self.min_margin:g}"] += 1

    def completion_rows(self, group: Row, left_out: Counter[str]) -> Iterator[Row]:
        """A row for each completion of a group."""
        for place, completion in enumerate(group["completions"]):
            row = {"prompt": _prompt(group), "completion": _answer(group, completion)} | _tools(group)
            row |= {f"score{suffix}": value for suffix, value in _scores(completion).items()}
            row |= {name: completion.get(name) for name in ("length", "finish", "author", "version")}
            yield row | _place(group, str(place))


def _pair_row(group: Row, pair: Row) -> Row:
    chosen, rejected = (group["completions"][pair[side]] for side in ("chosen", "rejected"))
    row = {"prompt": _prompt(group), "chosen": _answer(group, chosen), "rejected": _answer(group, rejected)}
    row |= _tools(group)
    scores = {"chosen": _scores(chosen), "rejected": _scores(rejected)}
    for suffix in dict.fromkeys([*scores["chosen"], *scores["rejected"]]):
        row |= {f"score_{side}{suffix}": values.get(suffix) for side, values in scores.items()}
    row |= {"margin": number(pair.get("margin")), "probability": number(pair.get("probability"))}
    row |= {f"finish_{side}": answer.get("finish") for side, answer in (("chosen", chosen), ("rejected", rejected))}
    return row | _place(group, f"{pair['chosen']}-{pair['rejected']}")


def _prompt(group: Row) -> str | list[Row]:
    prompt = group["prompt"]
    if not isinstance(prompt, (str, list)):
        raise TypeError("a prompt is a text or a list of messages")
    return prompt


def _answer(group: Row, completion: Row) -> str | list[Row]:
    """The completion in the form of its prompt: a text, or the assistant's message."""
    text = completion["text"]
    if not isinstance(text, str):
        raise TypeError("a completion is a text")
    return text if isinstance(group["prompt"], str) else [{"role": "assistant", "content": text}]


def _scores(completion: Row) -> dict[str, float | None]:
    """The score under the empty name, and the scorers' raw ones under theirs with an underscore before it."""
    by_scorer: Mapping[str, Any] = completion.get("rewards", {})
    return {"": number(completion.get("score"))} | {f"_{name}": number(value) for name, value in by_scorer.items()}


def _tools(group: Row) -> Row:
    """The tools that the prompt's chat template was given, as JSON."""
    tools = group.get("columns", {}).get("tools")
    if not tools:
        return {}
    return {"tools": tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)}


def _place(group: Row, inside: str) -> Row:
    """Where a row comes from: the step, the row of the dataset of prompts, and a name that no other row has."""
    identity = "-".join(str(group[name]) for name in ("step", "rank", "index", "round"))
    return {"step": group["step"], "row": group.get("prompt_row"), "id": f"{identity}-{inside}"}
