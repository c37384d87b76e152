"""Turn a YAML value or a command line word into what a field's annotation asks for, or say what is wrong with it."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import yaml

from online_dpo.cli.runfile.schema import FieldSpec
from online_dpo.cli.runfile.yaml_text import parse_yaml
from online_dpo.config.endpoints import secret_fields
from online_dpo.config.registry import nearest

TRUE_WORDS = frozenset({"true", "yes", "on"})
FALSE_WORDS = frozenset({"false", "no", "off"})
NULL_WORDS = frozenset({"null", "Null", "NULL", "~"})

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of characters: bytes of a command line that are not in UTF-8."""

WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


class BadValue(Exception):
    """A value that its field does not take. The message reads on from the field's name."""


def convert(spec: FieldSpec, value: Any) -> Any:
    """A value as YAML gives it, in the type of the field.

    YAML reads ``1e-4`` as text, ``no`` and ``off`` as false; they are taken for what they mean. One value where a list
    is wanted is a list of one.

    Raises:
        BadValue: the field takes no such value.
    """
    words = [word for word in spec.choices if word in FALSE_WORDS]
    if value is False and words:
        return words[0]
    kinds = alternatives(ast.parse(spec.annotation, mode="eval").body)
    for attempt in (_exactly, _by_meaning):
        for kind in kinds:
            accepted, result = attempt(kind, value)
            if accepted:
                return _check_characters(spec, _check_choice(spec, result))
    raise BadValue(f"is {_show(spec, value)}; wanted: {wanted(spec)}.{_hint(spec, kinds, value)}")


def convert_words(spec: FieldSpec, words: list[str]) -> Any:
    """The words after ``--field`` on a command line: none (switches on), one YAML or JSON value, or several (a list).

    Raises:
        BadValue: the field takes no such value.
    """
    if not words:
        if "bool" not in spec.annotation:
            raise BadValue(f"needs a value: {wanted(spec)}.")
        return convert(spec, True)
    if len(words) > 1:
        if "list" not in spec.annotation:
            raise BadValue(f"takes one value, not {len(words)}: {' '.join(words)}.")
        return convert(spec, [_parse_word(word) for word in words])
    parsed = _parse_word(words[0])
    try:
        return convert(spec, parsed)
    except BadValue as problem:
        if parsed == words[0]:
            raise
        try:  # `--run_name 12` is the text "12"
            return convert(spec, words[0])
        except BadValue:
            raise problem from None


def wanted(spec: FieldSpec) -> str:
    """What the field takes, in words: ``a whole number or null``."""
    kinds = alternatives(ast.parse(spec.annotation, mode="eval").body)
    words = [_describe(kind, spec) for kind in kinds]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "no value from a run file"


def alternatives(node: ast.expr) -> list[ast.expr]:
    """The parts of an annotation: two of ``int | None``."""
    if isinstance(node, ast.BinOp):
        return alternatives(node.left) + alternatives(node.right)
    return [node]


def type_name(kind: ast.expr) -> str:
    """The name of a type: ``list`` of ``list[float]``."""
    return ast.unparse(kind.value if isinstance(kind, ast.Subscript) else kind)


def _exactly(kind: ast.expr, value: Any) -> tuple[bool, Any]:
    """Whether the value is of that type already, and the value."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match type_name(kind):
        case "None":
            return value is None, value
        case "bool":
            return isinstance(value, bool), value
        case "int":
            return is_number and isinstance(value, int), value
        case "float":
            return is_number and not math.isnan(value), value
        case "str":
            return isinstance(value, str), value
        case "dict":
            return isinstance(value, dict) and all(isinstance(key, str) for key in value), value
        case "list":
            return _as_list(kind, value) if isinstance(value, list) else (False, value)
        case "Literal":
            allowed = ast.literal_eval(kind.slice) if isinstance(kind, ast.Subscript) else ()
            allowed = allowed if isinstance(allowed, tuple) else (allowed,)
            return any(value is one or (isinstance(one, str) and value == one) for one in allowed), value
        case _:
            return False, value


def _by_meaning(kind: ast.expr, value: Any) -> tuple[bool, Any]:
    """The value in that type, where there is no doubt what it means."""
    match type_name(kind), value:
        case "bool", str() if value.lower() in TRUE_WORDS | FALSE_WORDS:
            return True, value.lower() in TRUE_WORDS
        case "int", str() | float() if (number := _number(value)) is not None and number.is_integer():
            return True, int(number)
        case "float", str() if (number := _number(value)) is not None:
            return True, number
        case "list", str() | int() | float():
            return _as_list(kind, [value])
        case _:
            return False, value


def _as_list(kind: ast.expr, values: list[Any]) -> tuple[bool, Any]:
    if not isinstance(kind, ast.Subscript):
        return True, values
    converted = []
    for value in values:
        options = [attempt(one, value) for attempt in (_exactly, _by_meaning) for one in alternatives(kind.slice)]
        taken = [result for accepted, result in options if accepted]
        if not taken:
            return False, values
        converted.append(taken[0])
    return True, converted


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _check_choice(spec: FieldSpec, value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if spec.choices and isinstance(item, str) and item not in spec.choices:
            raise BadValue(
                f"is {_show(spec, value)}; wanted: {wanted(spec)}.{nearest(item.replace('-', '_'), spec.choices)}"
            )
    return value


def _check_characters(spec: FieldSpec, value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and (wrong := _NO_TEXT.search(item)):
            raise BadValue(f"is {_show(spec, value)}; it holds {wrong[0]!r}, which is no character of a text.")
    return value


def _parse_word(word: str) -> Any:
    """The value of a word on the command line. A text is the word as it stands, unless it is in quotes: no comment, tag
    or anchor is cut off, and no white space."""
    try:
        parsed = parse_yaml(word)
    except yaml.YAMLError:
        return word
    if isinstance(parsed, (list, dict)) or word.lstrip()[:1] in ("'", '"'):
        return parsed
    is_plain = parsed is not None and not isinstance(parsed, str) and " #" not in word
    return parsed if is_plain or word.strip() in NULL_WORDS else word


def _describe(kind: ast.expr, spec: FieldSpec) -> str:
    head = type_name(kind)
    if head == "str" and spec.choices:
        return f"one of {', '.join(spec.choices)}"
    if head == "dict":
        return "a mapping"
    if head == "list" and spec.choices:
        return "a list of these"
    if head == "list":
        items = alternatives(kind.slice) if isinstance(kind, ast.Subscript) else []
        plural = {"int": "whole numbers", "float": "numbers", "str": "texts"}
        return "a list" + "".join(f" of {plural[type_name(item)]}" for item in items[:1] if type_name(item) in plural)
    if head == "Literal" and isinstance(kind, ast.Subscript):
        return ast.unparse(kind.slice).replace("False", "false").replace("True", "true")
    return WANTED.get(head, "")


def _hint(spec: FieldSpec, kinds: list[ast.expr], value: Any) -> str:
    heads = [type_name(kind) for kind in kinds]
    takes_text = not spec.choices and "str" in heads and "dict" not in heads
    return " Write it in quotes." if takes_text and not isinstance(value, (str, list, dict, type(None))) else ""


def _show(spec: FieldSpec, value: Any) -> str:
    """A value for a message; a key is not shown."""
    if secret_fields({spec.name: value}):
        return "something that is not shown"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float, list, dict)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return str(value)
