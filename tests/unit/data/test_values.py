"""Columns reach rewards as they stand in the file, in every format, streamed or not."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import tempfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online_dpo import OnlineDPOConfig
from online_dpo.cli.judging.pairs_file import read_pairs
from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import prepare_prompts
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.types import Completion, Group
from support import tiny
from support.processes import environment, run_python


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def prepared(rows, **kwargs):
    args = OnlineDPOConfig(output_dir="unused", use_cpu=True, report_to="none", **kwargs)
    return prepare_prompts(rows, tiny.tokenizer(chat=True), args)[0]


def columns_of(rows, **kwargs):
    """The columns that a reward function is given for each prompt."""
    prompts = prompts_from_batch(collate_prompts(list(prepared(rows, **kwargs))))
    seen = {}
    groups = [Group(prompt, (Completion((1,), (0.0,), "stop", 0, "w1"),)) for prompt in prompts]

    def reward(completions, **others):
        seen.update({name: others[name] for name in groups[0].prompt.columns})
        return [0.0] * len(completions)

    FunctionScorer(reward).score(groups)
    return seen


def same(found, expected):
    """Equal, and of the same types at every depth: 18 is not 18.0, True is not 1."""
    return repr(found) == repr(expected)


COLUMNS = {
    "date": ["2024-01-31", "2024-02-01"],
    "time": ["2024-01-31T10:00:00Z", "2024-01-31 10:00:00"],
    "number": [18, 2.5],
    "whole": [18.0, 2.0],
    "count": [7, None],
    "big": [2**63, -(2**70)],
    "most": [2**63 - 1, -(2**63)],
    "precise": [0.1234567890123456, 1e-300],
    "far": [math.nan, math.inf],
    "truth": [True, False],
    "truth_or_number": [True, 1],
    "number_as_text": ["007", "1e5"],
    "number_or_its_text": [7, "7"],
    "words_for_nothing": ["NA", "null"],
    "nothing": [None, None],
    "json_as_text": ['{"a": 1}', "[1, 2]"],
    "json_or_its_text": [{"a": 1}, '{"a": 1}'],
    "keys": [{"a": 1}, {"b": {"c": None}}],
    "nested": [{"a": [1, {"b": 2}]}, {"a": [1.5, "x", None, []]}],
    "list": [[1, 2], []],
    "mixed_list": [[1, "2", 3.0, None], [True]],
    "empty_dict": [{}, {"a": []}],
    "unicode": ["naïve 日本語 🙂 \u2028 \ufeff", "a\r\nb\tc\x00"],
    "half_of_a_character": ["\ud83d", "x"],
}
ROWS = [{"prompt": f"w{i}", **{name: values[i] for name, values in COLUMNS.items()}} for i in range(2)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
JSON_FILES = {
    "x.jsonl": LINES,
    "x.jsonl.gz": LINES,
    "x.ndjson": LINES.replace("\n", "\r\n"),
    "x.json": json.dumps(ROWS, indent=1),
    "x.json.gz": json.dumps(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "folder/train.jsonl": LINES,
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_values_of_json_files(tmp_path, name, streaming):
    path = write(tmp_path / name, JSON_FILES[name])
    source = path.parent if "/" in name else path
    rows = load_prompts(str(source), streaming=streaming)
    assert same(list(rows), ROWS)
    assert same(columns_of(rows), COLUMNS)


def test_a_missing_column_is_none_and_a_missing_key_of_a_dict_stays_missing(tmp_path, streaming):
    write(tmp_path / "a.jsonl", '{"prompt": "w1", "meta": {"x": 1}, "only_here": 1}\n{"prompt": "w2"}\n')
    write(tmp_path / "b.jsonl", '{"prompt": "w3", "meta": {"y": null}, "late": [0]}\n')
    found = columns_of(load_prompts(str(tmp_path), streaming=streaming))
    assert found == {
        "meta": [{"x": 1}, None, {"y": None}],
        "only_here": [1, None, None],
        "late": [None, None, [0]],
    }


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1", "null", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), JSON_VALUES, min_size=1), min_size=1, max_size=4))
def test_any_json_rows_are_the_same_mapped_streamed_and_given_as_a_list(rows):
    columns = dict.fromkeys(name for row in rows for name in row)
    expected = [{"prompt": "w1", **dict.fromkeys(columns), **row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        text = "".join(json.dumps({"prompt": "w1", **row}) + "\n" for row in rows)
        path = str(write(Path(folder) / "x.jsonl", text))
        for read in (load_prompts(path), load_prompts(path, streaming=True), expected):
            found = [{name: row[name] for name in expected[0]} for row in prepared(read)]
            assert same(found, expected)


CSV = (
    'id,prompt,score,date,note,"quoted, name"\r\n'
    '007,w1,18,2024-01-31,NA,"a\r\n""b"", c"\r\n'
    "\r\n"
    "1e5,w2,2.5,null,,true\r\n"
    " 9 ,w3,nan,日本,None,\r\n"
)
CSV_COLUMNS = {
    "id": ["007", "1e5", " 9 "],
    "score": ["18", "2.5", "nan"],
    "date": ["2024-01-31", "null", "日本"],
    "note": ["NA", "", "None"],
    "quoted, name": ['a\r\n"b", c', "true", ""],
}


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "bom.csv", "x.tsv", "x.tsv.gz", "folder/train.csv"])
def test_values_of_csv_files_are_their_text(tmp_path, name, streaming):
    content = CSV.encode()
    if "tsv" in name:
        content = CSV.replace(",", "\t").replace('"quoted\t name"', '"quoted, name"').replace('\t c"', ', c"').encode()
    path = write(tmp_path / name, b"\xef\xbb\xbf" * ("bom" in name) + content)
    rows = load_prompts(str(path.parent if "/" in name else path), streaming=streaming)
    assert same(columns_of(rows), CSV_COLUMNS)


def test_columns_of_csv_files_have_the_types_that_are_asked_for(tmp_path, streaming):
    path = write(tmp_path / "x.csv", "prompt,id,year,score,right,day\nw1,007,007,18,true,2024-01-31\nw2,8,,2.5,,\n")
    types = {"year": "int64", "score": "float64", "right": "bool", "day": "date32"}
    assert same(
        columns_of(load_prompts(str(path), streaming=streaming, types=types)),
        {
            "id": ["007", "8"],
            "year": [7, None],
            "score": [18.0, 2.5],
            "right": [True, None],
            "day": [datetime.date(2024, 1, 31), None],
        },
    )


@pytest.mark.parametrize(
    ("content", "types", "message"),
    [
        ("prompt,a\nw1,1\nw2,x\n", {"a": "int64"}, r"x\.csv: row 2 has 'x' in column `a`, which is no int64"),
        ("prompt,a\nw1,1\n", {"b": "int64"}, r"x\.csv has no column b, for which a type is given.*prompt, a"),
        ("prompt,a\nw1,1\n", {"a": "integer"}, r"Column `a` has the type 'integer', which does not exist"),
        ("prompt,a,a\nw1,1,2\n", {}, r"x\.csv: its header has 'a' more than once"),
        ("prompt,a\nw1,1,2\n", {}, r"x\.csv: line 2 has 3 fields, and the header has 2"),
        ("prompt,a\nw1,\xe4\n".encode("latin-1"), {}, r"x\.csv: the text is not in UTF-8 .* byte 0xe4"),
    ],
)
def test_csv_files_that_cannot_be_read_so_are_named(tmp_path, streaming, content, types, message):
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), streaming=streaming, types=types)


def test_types_are_ignored_with_a_warning_where_data_have_types(tmp_path, streaming, caplog):
    path = write(tmp_path / "x.jsonl", '{"prompt": "w1", "a": "1"}\n')
    assert columns_of(load_prompts(str(path), streaming=streaming, types={"a": "int64"})) == {"a": ["1"]}
    assert "the given types of columns are ignored" in caplog.text


TYPED = {
    "time": [datetime.datetime(2024, 1, 31, 10), None],
    "date": [datetime.date(2024, 1, 31), None],
    "text": ["2024-01-31", "007"],
    "number": [18.0, 2.5],
    "count": [7, None],
    "list": [[1, 2], []],
    "struct": [{"a": 1, "b": None}, {"a": None, "b": "x"}],
}


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved split", "object"])
def test_values_that_have_types_keep_them(tmp_path, kind, streaming):
    given = Dataset.from_dict({"prompt": ["w1", "w2"], **TYPED})
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x")
    if kind == "parquet":
        given.to_parquet(path)
    elif kind != "object":
        (DatasetDict(train=given) if kind == "saved split" else given).save_to_disk(path)
    if kind == "object":
        rows = given.to_iterable_dataset() if streaming else given
    else:
        rows = load_prompts(str(path), streaming=streaming)
    assert same(columns_of(rows), TYPED)


def test_a_list_of_rows_reaches_rewards_as_it_is():
    assert same(columns_of(ROWS), COLUMNS)
    dates = [{"prompt": "w1", "day": datetime.date(2024, 1, 31)}, {"prompt": "w2", "day": None}]
    assert columns_of(dates) == {"day": [datetime.date(2024, 1, 31), None]}


def test_prompts_and_templates_read_the_same_values(tmp_path, streaming):
    path = write(
        tmp_path / "x.jsonl", '{"n": 18, "who": {"name": "w1"}}\n{"n": 2.5, "who": {"name": "w2", "age": 3}}\n'
    )
    rows = load_prompts(str(path), streaming=streaming)
    found = list(prepared(rows, prompt_template="{n} {who}"))
    assert [row["prompt"] for row in found] == ["18 {'name': 'w1'}", "2.5 {'name': 'w2', 'age': 3}"]


def test_messages_keep_their_own_keys_and_a_prompt_of_another_kind_is_counted(tmp_path, streaming):
    call = {"role": "assistant", "content": "w2", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    chats = [
        [{"role": "user", "content": "w1"}],
        [{"role": "user", "content": "w1"}, call, {"role": "user", "content": "w3"}],
    ]
    text = "".join(json.dumps({"prompt": prompt, "i": i}) + "\n" for i, prompt in enumerate([*chats, "w1"]))
    rows = load_prompts(str(write(tmp_path / "x.jsonl", text)), streaming=streaming)
    found = list(prepared(rows, invalid_prompts="filter"))
    assert [row["prompt"] for row in found if row["prompt_invalid"] is None] == chats
    assert [row["i"] for row in found if row["prompt_ids"]] == [0, 1]


def cache_files(path):
    return [file["filename"] for file in prepared(load_prompts(str(path))).cache_files]


def test_mapped_rows_stay_on_the_disk_and_a_file_that_has_changed_is_read_anew(tmp_path):
    path = write(tmp_path / "x.jsonl", LINES)
    files = cache_files(path)
    assert files and all(Path(file).is_file() for file in files) and cache_files(path) == files
    write(path, '{"prompt": "w3", "number": "new"}\n')
    assert columns_of(load_prompts(str(path))) == {"number": ["new"]}


@pytest.mark.slow
def test_another_process_finds_the_prepared_rows_again(tmp_path):
    path = write(tmp_path / "x.jsonl", LINES)
    files = cache_files(path)
    load = "from test_values import cache_files; print(cache_files(sys.argv[2]))"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {load}"
    own = environment(HF_DATASETS_CACHE=str(datasets.config.HF_DATASETS_CACHE))
    again = run_python("-c", code, Path(__file__).parent, path, env=own, check=True)
    assert again.stdout.splitlines()[-1] == str(files)


def test_a_split_of_mapped_files_is_cut_as_before(tmp_path):
    write(tmp_path / "train.jsonl", '{"prompt": "w1", "x": 1}\n{"prompt": "w2", "x": 2}\n')
    write(tmp_path / "test.jsonl", '{"prompt": "w3", "x": 2.5}\n')
    for split, expected in (("train[1:]", [2]), ("train[:50%]", [1]), ("train+test", [1, 2, 2.5]), ("test", [2.5])):
        assert same(columns_of(load_prompts(str(tmp_path), split=split)), {"x": expected})


def test_a_stream_of_a_table_and_a_transformed_table_are_left_to_themselves():
    mixed = Dataset.from_dict({"prompt": ["w1", "w2"], "x": [1, "a"]}, on_mixed_types="use_json")
    assert columns_of(mixed) == {"x": [1, "a"]}
    upper = Dataset.from_dict({"prompt": ["w1"], "x": ["a"]}).with_transform(lambda b: {k: ["no"] for k in b})
    assert columns_of(upper) == {"x": ["a"]}
    assert isinstance(prepared(IterableDataset.from_generator(lambda: iter(ROWS))), IterableDataset)


def test_pairs_that_are_judged_have_their_values(tmp_path):
    pair = {"prompt": "w1", "response_a": "w2", "response_b": "w3"}
    text = "".join(json.dumps({**pair, **row, "prompt": "w1"}) + "\n" for row in ROWS)
    path = write(tmp_path / "pairs.jsonl", b"\xef\xbb\xbf" + text.encode())
    assert same([{name: one.row[name] for name in COLUMNS} for one in read_pairs(path, None)],
                [{name: row[name] for name in COLUMNS} for row in ROWS])  # fmt: skip
