"""docs/troubleshooting.md names what there is: metrics, fields, events, and messages as the code has them."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.runs.events import Kind
from online_dpo.stats.catalogue import Metric

ROOT = Path(__file__).parents[2]
METRICS = [
    Metric(name, "", "", "")  # the page is that of the catalogue: tests/unit/training/metrics/test_page.py
    for name in re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/reference/metrics.md").read_text(), re.M)
]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SYMPTOMS = {part.split("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
FORM = ("**What you see.**", "**Look at.**", "**Likely causes.**", "**Cure.**")
MESSAGES = [line for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
WORDS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S))
VALUE = r"(?:: ?.*)?"
JUDGE_ANSWERS = {"rubric", "template", "order"}
NO_FIELDS = {"eos_token", "tokenizer", "true", "error"}
"""Words of code that are neither metrics nor fields."""


def texts_of_the_code() -> str:
    """All texts in the package, one a line, with ``…`` for what is put in while it runs."""
    found = []
    for file in sorted((ROOT / "src/online_dpo").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[a-z]", "…", node.value).replace("%%", "%"))
    return "\n".join(found)


TEXTS = texts_of_the_code()


@pytest.mark.parametrize("title", SYMPTOMS)
def test_a_symptom_has_the_form_of_all(title):
    places = [SYMPTOMS[title].find(part) for part in FORM]
    assert -1 not in places and places == sorted(places)


def test_every_symptom_is_in_the_table_at_the_top():
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE.partition("\n## ")[0])
    assert set(linked) == {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in SYMPTOMS}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message):
    """Each part between what varies stands in a text of the code."""
    parts = [part.strip(" .;:(),") for part in message.split("…")]
    parts = [part for part in parts if len(part) > 3]
    assert parts and [part for part in parts if part not in TEXTS] == []


def test_metrics_that_are_named_are_described():
    named = [word for word in WORDS if re.fullmatch(r"[a-z_]+(/[\w*-]+)+", word) and not word.startswith("path/")]
    assert len(named) > 60
    assert [word for word in named if word != "dropped/*" and not is_metric(word)] == []
    assert [word for word in WORDS if word.startswith("eval_") and not is_known(word)] == []


def is_metric(word: str) -> bool:
    return any(metric.name == word or metric.matches(word) for metric in METRICS)


def is_known(word: str) -> bool:
    return is_metric(word) or word in load_fields() or word in JudgeSettings.__dataclass_fields__


def test_fields_that_are_named_exist():
    """Words such as ``beta`` or ``max_length_ratio: 2`` are fields, settings of a judge, metrics or kinds of events."""
    kinds = set(get_args(Kind))
    named = {found[1] for word in WORDS if (found := re.fullmatch(rf"([a-z][a-z0-9_]*){VALUE}", word))}
    values = {choice for spec in load_fields().values() for choice in spec.choices or ()}
    unknown = {word for word in named if not is_known(word) and word not in kinds | values | NO_FIELDS}
    assert len(named) > 70 and unknown == set()
