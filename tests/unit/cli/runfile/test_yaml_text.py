"""YAML from outside: numbers of YAML 1.2, and limits."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import yaml

from online_dpo.cli.runfile.yaml_text import MAX_DEPTH, parse_yaml

VALUES = {
    "1:30": "1:30",
    "190:20:30.15": "190:20:30.15",
    "010": "010",
    "2024-01-31": "2024-01-31",
    "2024-13-45": "2024-13-45",
    "1e-5": 1e-5,
    "1.5E+3": 1500.0,
    ".5": 0.5,
    "1_000": 1000,
    "0x1F": 31,
    "0b11": 3,
    "-7": -7,
    "0": 0,
    "0.10": 0.1,
    "1e400": "1e400",
    "12e": "12e",
    "1.2.3": "1.2.3",
    "-": [None],
    "yes": True,
    "off": False,
    "~": None,
    "-.inf": -math.inf,
    "'5'": "5",
    "!!str 5": "5",
    "!!int '5'": 5,
    "[1e-6, 08]": [1e-6, "08"],
    "{<<: {a: 1}, b: 2}": {"a": 1, "b": 2},
    "[&a x, *a]": ["x", "x"],
    "": None,
}


@pytest.mark.parametrize(("text", "value"), VALUES.items(), ids=list(VALUES))
def test_values(text: str, value: Any) -> None:
    assert repr(parse_yaml(text)) == repr(value)


def bomb(first: str, each: str) -> str:
    """Nine lines, of which each repeats the one before nine times: 9**9 values."""
    names = "abcdefghij"
    lines = [f"a: &a {first}"]
    lines += [f"{y}: &{y} {each.format(', '.join([f'*{x}'] * 9))}" for x, y in zip(names, names[1:], strict=False)]
    return "\n".join(lines)


REFUSED = {
    "billion laughs": (bomb("[x]", "[{}]"), "more than 20000 values, counted as often as aliases repeat them"),
    "merge keys": (bomb("{k: x}", "{{<<: [{}]}}"), "more than 20000 values"),
    "itself": ("&a [*a]", "an alias refers to what it stands in"),
    "itself in a mapping": ("a: &a {b: [*a]}", "an alias refers to what it stands in"),
    "itself by a merge": ("&a {<<: *a}", "an alias refers to what it stands in"),
    "deep flow": ("[" * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
    "deep mappings": ("{a: " * 5_000, f"nested more than {MAX_DEPTH} levels deep"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(500)), f"nested more than {MAX_DEPTH} levels deep"),
    "an object": ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a date by tag": ("!!timestamp x", "could not determine a constructor"),
    "bytes": ("!!binary aGk=", "could not determine a constructor"),
    "a set": ("!!set {a, b}", "could not determine a constructor"),
    "no int": ("!!int x", "'x' is no int"),
    "no bool": ("!!bool x", "'x' is no bool"),
    "no float": ("!!float x", "'x' is no float"),
    "a long number": ("9" * 5000, "is no int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_quickly(name: str) -> None:
    text, message = REFUSED[name]
    begin = time.process_time()
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        parse_yaml(text)
    assert message in str(caught.value.problem)
    assert time.process_time() - begin < 20  # milliseconds, on a machine with nothing else to do
