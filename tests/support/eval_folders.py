"""Folders with two models, prompts and rewards, and `online-dpo eval` on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from online_dpo.cli.evaluation.plan import plan_eval
from online_dpo.cli.main import main
from online_dpo.cli.runfile.entries import UsageError
from support import tiny

REWARDS = """
def words(completions):
    return [float(len(c.split())) for c in completions]


def forced(completions):
    return [float(c.split()[:1] == ["w7"]) for c in completions]


def partly(prompts, completions):
    first = prompts[0].split()[0]
    return [None if p.split()[0] == first else float(len(c.split())) for p, c in zip(prompts, completions)]


def checks(completions, solution):
    return [0.0] * len(completions)


def note(completions, **columns):
    columns = {name: columns[name] for name in ("id", "day", "n", "meta") if name in columns}
    with open("seen.txt", "a") as file:
        file.writelines(repr(dict(zip(columns, row))) + "\\n" for row in zip(*columns.values()))
    return [0.0] * len(completions)


def fails(completions):
    raise ConnectionError("away")


def second(prompts, pairs, shuffle_order=True):
    return [1] * len(prompts)
"""

SHORT = ("--max_new_tokens", "8", "--max_length", "64", "--use_cpu")
LENGTHS = [4, 5, 6, 7] * 4


def save(name, model, tokenizer=None):
    model.save_pretrained(name)
    (tokenizer or tiny.tokenizer()).save_pretrained(name)


def run(*words):
    return main(["eval", *map(str, words)])


def figures(capsys, *words):
    """The JSON of a run that must succeed, and what it printed."""
    code = run(*words, "--json", "figures.json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(Path("figures.json").read_text()), printed


def problems_of(*words, file=None):
    with pytest.raises(UsageError) as caught:
        plan_eval(file, words)
    return list(caught.value.problems)


MODELS = ("--model", "policy", "--against", "other")
PROMPTS = ("--prompts", "prompts.jsonl")
