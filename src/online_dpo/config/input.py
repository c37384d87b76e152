"""Converts values from command lines and YAML files to those that Python code would give.

``HfArgumentParser`` and TRL's parser know one type for each field: a field that may be one word or several comes as a
list of one, a mapping as text. YAML reads ``1e-6`` as text and ``off`` as false.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
import re
from typing import TYPE_CHECKING, Any

from online_dpo.config.field_specs import FieldSpec, specs_of
from online_dpo.config.json_text import parse_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

MAPPINGS = ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs")
"""Fields that hold a mapping, or JSON text of one."""
FALSE_WORDS = ("off", "no")


def normalize_input(args: TrainingArguments) -> None:
    """Convert the values of all groups of fields to those that Python code would give.

    Raises:
        ValueError: a mapping is no JSON object, or what should be a number is none.
    """
    for name in MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str):
            setattr(args, name, mapping_from_text(name, value))
    for spec in specs_of(type(args)).values():
        setattr(args, spec.name, _normalized(spec, getattr(args, spec.name)))
    for name, is_whole in number_fields(type(args)).items():
        value = getattr(args, name)
        several = isinstance(value, (list, tuple))
        items = [_plain_number(name, item, is_whole) for item in (value if several else [value])]
        setattr(args, name, items if several else items[0])


def number_fields(cls: type) -> dict[str, bool]:
    """The fields of a dataclass that hold nothing but a number, a list of them, or ``None``; each with whether it is a
    whole one.
    """
    kinds = {}
    for field in dataclasses.fields(cls):
        annotation = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        words = set(re.findall(r"\w+", annotation)) - {"None", "list"}
        if words and words <= {"int", "float"}:
            kinds[field.name] = "float" not in words
    return kinds


def _plain_number(name: str, value: Any, is_whole: bool) -> Any:
    """The number that a text or a number of another type is, such as 2 for ``"2"`` or ``2.0`` where it is whole."""
    if value is None:
        return None
    what = "a whole number" if is_whole else "a number"
    if isinstance(value, str):
        try:
            value = int(value) if is_whole and value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"`{name}` must be {what}; it is {value!r}.") from None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be {what}; it is {value!r}.")
    if not is_whole or isinstance(value, numbers.Integral):
        return value
    number = float(value)
    if not number.is_integer():  # nan and infinity are none either
        raise ValueError(f"`{name}` must be {what}; it is {value!r}.")
    return int(number)


def _normalized(spec: FieldSpec, value: Any) -> Any:
    several = isinstance(value, (list, tuple))
    if "list[float]" in spec.annotation:
        items = value if several else [value]
        if any(isinstance(item, str) for item in items):
            numbers = [_number(spec.name, item) for item in items]
            value = numbers if several else numbers[0]
    may_be_one = "list[" in spec.annotation and "None" not in spec.annotation
    if may_be_one and several and len(value) == 1:
        value = value[0]
    words = [word for word in spec.choices if word in FALSE_WORDS]
    return words[0] if words and value is False else value


def mapping_from_text(name: str, text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the text is no JSON object; the message begins with the field's ``name``.
    """
    problem = ""
    try:
        value = parse_json(text)
    except ValueError as error:
        value, problem = None, "" if isinstance(error, json.JSONDecodeError) else f" ({error})"
    if not isinstance(value, dict):
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise ValueError(f"`{name}` must be a dict, or a JSON object as text; it is {shown!r}{problem}.")
    return value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must hold numbers; it holds {value!r}.") from None
