"""What a checkpoint holds of a step goes to JSON and back exactly; what is no such file is refused in one line."""

import json
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.checkpoints.codec import from_json, read_json, to_json, write_json
from online_dpo.errors import CheckpointError
from online_dpo.types import Completion, Notes, Preference, Scores, Verdicts

floats = st.floats()  # with NaN and infinities
texts = st.text(st.characters(codec=None))  # with lone surrogates, which a byte-level tokenizer may decode to
numbers = st.one_of(floats, st.integers())
completions = st.builds(
    Completion,
    token_ids=st.lists(st.integers(0, 10**30)).map(tuple),
    logprobs=st.lists(numbers).map(tuple),
    finish_reason=st.sampled_from(["stop", "length"]),
    policy_version=st.integers(),
    text=texts,
    author=st.sampled_from(["policy", "reference", "mixture"]),
)
tables = st.lists(st.lists(st.none() | numbers))
scores = st.builds(Scores, tables, st.dictionaries(texts, tables), st.none() | tables)
preferences = st.builds(Preference, st.integers(), st.integers(), floats)
verdicts = st.builds(Verdicts, st.lists(st.none() | preferences), st.integers(), st.integers(), st.none() | scores)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
)
notes = st.builds(Notes, st.dictionaries(texts, st.lists(floats)), st.dictionaries(texts, st.lists(plain)))


@settings(max_examples=60, deadline=None)
@given(st.one_of(completions.map(lambda v: (Completion, v)), notes.map(lambda v: (Notes, v)),
                 st.one_of(scores, verdicts).map(lambda v: (Scores | Verdicts, v))))  # fmt: skip
def test_what_is_written_is_read_exactly(typed):
    as_type, value = typed
    read = from_json(as_type, json.loads(json.dumps(to_json(value))))
    assert type(read) is type(value) and repr(read) == repr(value)  # NaN is not equal to itself, -0.0 is to 0.0


def test_a_file_is_read_as_it_was_written(tmp_path):
    value = Scores([[0.1 + 0.2, -0.0, math.inf, None]], {"a": [[1, 5e-324, math.nan, None]]})
    write_json(tmp_path / "file", value)
    assert repr(read_json(tmp_path / "file", Scores)) == repr(value)


GOOD = to_json(Completion((1, 2), (-0.5, -1.0), "stop", 3, "w1 w2"))
BROKEN = {
    "another kind": GOOD | {"kind": "Scores"},
    "a field is missing": {name: value for name, value in GOOD.items() if name != "text"},
    "a text for a number": GOOD | {"policy_version": "3"},
    "true for a number": GOOD | {"token_ids": [True, 2]},
    "a number that is not whole": GOOD | {"token_ids": [1.5]},
    "a mapping for a list": GOOD | {"logprobs": {"0": 1.0}},
    "null for a text": GOOD | {"text": None},
    "another literal": GOOD | {"finish_reason": "crash"},
    "a list for an object": [GOOD],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_of_another_type_is_refused(name):
    with pytest.raises(ValueError, match="wanted |lacks "):
        from_json(Completion, BROKEN[name])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"kind": "Completion"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"kind": "Completion", "policy_version": 1' + b"0" * 5000 + b"}",
        pickle.dumps(print),
    ],
    ids=["empty", "no text", "cut off", "deep", "a number of 5000 digits", "a pickle"],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.json is damaged \(.*\)\. Give another checkpoint\.") as caught:
        read_json(tmp_path / "file.json", Completion)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"file\.json is missing, so this checkpoint is not whole"):
        read_json(tmp_path / "file.json", Completion)


def test_what_json_does_not_have_is_refused_and_a_number_of_numpy_is_a_number():
    import numpy

    numbers = replace(from_json(Completion, GOOD), policy_version=numpy.int64(3), logprobs=(numpy.float64(0.1), 1.0))
    assert to_json(numbers)["policy_version"] == 3
    for value in (object(), {1: 2}, b"bytes"):
        with pytest.raises(TypeError):
            to_json(value)
