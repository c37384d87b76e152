"""JSON from outside: each value is the one that was written, or an error says why not."""

from __future__ import annotations

import io
import json
import math

import pytest

from online_dpo.config import json_text
from online_dpo.config.json_text import MAX_DEPTH, bounded_lines, depth_of, parse_json


def test_values_are_those_of_json() -> None:
    text = '{"a": [1, 2.5, -0.1e-3, true, null, "x"], "big": 123456789012345678901234567890, "b": {"a": {}}}'
    assert parse_json(text) == json.loads(text)
    assert math.isnan(parse_json("NaN")) and parse_json("-Infinity") == -math.inf
    assert parse_json("0.12345678901234567890") == 0.12345678901234568
    assert parse_json("1234567890123456.5") == 1234567890123456.5


@pytest.mark.parametrize(
    ("text", "message"),
    {
        '{"a": 1, "a": 2}': "the key 'a' stands twice in one object",
        '[{"b": {"k": 1, "k": 1}}]': "the key 'k' stands twice in one object",
        "1e400": "the number 1e400 is beyond the range of a float; write it as text",
        "[-1e999]": "the number -1e999 is beyond the range of a float",
        "12345678901234567.25": "the number 12345678901234567.25 has more digits than a float holds; write it as text",
        "9" * 5000: "a number has 5000 digits; write it as text",
        "[" * 20_000 + "]" * 20_000: "it is nested more than 100 levels deep",
        '{"a":' * 20_000 + "1" + "}" * 20_000: "it is nested more than 100 levels deep",
        "[" * 200_000: "it is nested more than 100 levels deep",
        "{'a': 1}": "Expecting property name enclosed in double quotes",
        "": "Expecting value",
    }.items(),
    ids=lambda value: value[:20],
)
def test_what_would_be_another_value_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        parse_json(text)


def test_brackets_in_texts_and_beside_each_other_are_no_depth() -> None:
    assert parse_json(json.dumps({"a": '[{\\"' * 500})) == {"a": '[{\\"' * 500}
    assert parse_json("[" + "[],{}," * 500 + "[]]")[:2] == [[], {}]
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert depth_of(parse_json(deepest)) == MAX_DEPTH
    with pytest.raises(ValueError, match="nested more than"):
        parse_json(f"[{deepest}]")


def test_depth_of_a_value_that_holds_itself_is_above_the_limit() -> None:
    endless: list = [1]
    endless.append(endless)
    assert depth_of(endless, limit=7) == 8
    assert [depth_of(value) for value in (1, [], {"a": 1}, [[], {"b": [0]}])] == [0, 1, 1, 3]


def test_a_line_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE", 5)
    lines = bounded_lines(io.StringIO("abc\n" + "x" * 100))
    assert next(lines) == "abc\n"
    with pytest.raises(ValueError, match="^line 2 is longer than 5 characters$"):
        next(lines)
