"""A reward for GSM8K answers: calculator annotations that are right, and a last line with the answer.

An answer of the dataset looks like this::

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    #### 72
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
LAST_LINE = re.compile(r"(?:^|\n)#### (-?[\d,]*\.?\d+)\s*$")
OPERATIONS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def format_reward(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """From 0 to 3: the share of right annotations, plus 1 for an answer line, plus 1 if the answer is the right one."""
    return [score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def score(completion: str, gold: str) -> float:
    """The reward of one answer."""
    annotations = ANNOTATION.findall(completion)
    right = sum(is_right(expression, result) for expression, result in annotations)
    share = right / len(annotations) if annotations else 0.0
    given, wanted = final_number(completion), final_number(gold)
    return share + (given is not None) + (given is not None and given == wanted)


def is_right(expression: str, result: str) -> bool:
    """Whether ``48/2`` is ``24``, to the two decimals that the dataset writes."""
    value, claimed = evaluate(expression), evaluate(result)
    return value is not None and claimed is not None and abs(value - claimed) <= Fraction(1, 100)


def evaluate(expression: str) -> Fraction | None:
    """The value of a sum of plain numbers, or ``None`` for anything else. Nothing is executed."""
    text = expression.replace(",", "").replace("$", "").replace("%", "/100").strip()
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no sum of plain numbers")


def final_number(text: str) -> Fraction | None:
    """The number of the last line, if that is an answer line."""
    found = LAST_LINE.search(text.rstrip())
    return None if found is None else Fraction(found.group(1).replace(",", ""))
