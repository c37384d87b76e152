"""Loading: every format, map-style and streaming, and messages that name what is wrong."""

from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader

from online_dpo.data.load import load_prompts

ROWS = [{"prompt": "a", "label": 1}, {"prompt": "b\nc", "label": 2}, {"prompt": "d", "label": 3}]
TEXT_ROWS = [{**row, "label": str(row["label"])} for row in ROWS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


CSV = 'prompt,label\na,1\n"b\nc",2\nd,3\n'
CONTENTS = {
    "x.json": json.dumps(ROWS, indent=1),
    "lines.json": lines(ROWS),
    "x.json.gz": json.dumps(ROWS),
    "x.jsonl": lines(ROWS),
    "x.y.JSONL": lines(ROWS),
    "x.jsonl.gz": lines(ROWS),
    "x.ndjson": lines(ROWS),
    "x.ndjson.gz": lines(ROWS),
    "x.csv": CSV,
    "x.csv.gz": CSV,
    "x.tsv": CSV.replace(",", "\t"),
    "x.tsv.gz": CSV.replace(",", "\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_formats(tmp_path, name, streaming):
    path = write(tmp_path / name, CONTENTS[name])
    dataset = load_prompts(str(path), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == (TEXT_ROWS if "csv" in name or "tsv" in name else ROWS)


def test_parquet(tmp_path, streaming):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "x.parquet")
    assert list(load_prompts(str(tmp_path / "x.parquet"), streaming=streaming)) == ROWS


def test_a_stream_can_be_read_again(tmp_path):
    dataset = load_prompts(str(write(tmp_path / "x.jsonl.gz", lines(ROWS))), streaming=True)
    assert list(dataset) == ROWS
    assert list(dataset) == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_workers_of_a_data_loader_read_every_row_of_a_stream_once(tmp_path, suffix):
    for i in range(3):
        if suffix == "parquet":
            Dataset.from_list(ROWS[i : i + 1]).to_parquet(tmp_path / f"{i}.parquet")
        else:
            row = ROWS[i]
            content = f'prompt,label\n"{row["prompt"]}",{row["label"]}\n' if suffix == "csv" else lines([row])
            write(tmp_path / f"{i}.{suffix}", content)
    stream = load_prompts(str(tmp_path), streaming=True)
    assert stream.n_shards == 3
    read = [row for batch in DataLoader(stream, batch_size=2, num_workers=2, collate_fn=list) for row in batch]
    assert sorted(read, key=lambda row: row["label"]) == (TEXT_ROWS if suffix == "csv" else ROWS)


def test_resumed_stream_goes_on_where_it_was(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS[:2]))
    write(tmp_path / "b.jsonl", lines(ROWS[2:]))
    stream = load_prompts(str(tmp_path), streaming=True)
    rows = iter(stream)
    next(rows)
    state = stream.state_dict()
    resumed = load_prompts(str(tmp_path), streaming=True)
    resumed.load_state_dict(state)
    assert list(resumed) == ROWS[1:]


def test_byte_order_mark(tmp_path, streaming):
    for name, content in (("lines.jsonl", lines(ROWS)), ("array.json", json.dumps(ROWS))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(load_prompts(str(tmp_path / name), streaming=streaming)) == ROWS


def test_limit(tmp_path, streaming):
    path = str(write(tmp_path / "x.jsonl", lines(ROWS)))
    assert list(load_prompts(path, streaming=streaming, limit=2)) == ROWS[:2]
    assert list(load_prompts(path, streaming=streaming, limit=9)) == ROWS
    with pytest.raises(ValueError, match="`limit` must be at least 1; it is 0"):
        load_prompts(path, streaming=streaming, limit=0)


def test_a_file_is_the_split_that_is_asked_for(tmp_path, streaming):
    path = write(tmp_path / "questions-test.jsonl", lines(ROWS))
    for split in ("train", "test", "validation"):
        assert list(load_prompts(str(path), split=split, streaming=streaming)) == ROWS


def test_a_slice_of_a_split(tmp_path):
    path = write(tmp_path / "x.jsonl", lines(ROWS))
    assert list(load_prompts(str(path), split="train[1:]")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"x\.jsonl.*\"train\[:0\]\" corresponds to no data"):
        load_prompts(str(path), split="train[:0]")


def test_glob_reads_files_in_order_and_fills_missing_columns(tmp_path, streaming):
    write(tmp_path / "b.jsonl", lines([{"prompt": "z"}]))
    write(tmp_path / "a.jsonl.gz", lines(ROWS))
    write(tmp_path / "notes.txt", "not read")
    dataset = load_prompts(str(tmp_path / "*.jsonl*"), streaming=streaming)
    assert list(dataset) == [*ROWS, {"prompt": "z", "label": None}]


@pytest.mark.smoke
def test_mixed_values_come_back_as_they_were(tmp_path, streaming):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": 3}]
    assert list(load_prompts(str(write(tmp_path / "x.jsonl", lines(rows))), streaming=streaming)) == rows


@pytest.mark.parametrize("folder", ["data", "data[v2]"])
def test_splits_of_a_folder(tmp_path, streaming, folder):
    if folder == "data[v2]":
        path = write(tmp_path / folder / "train.jsonl", lines(ROWS))
        assert list(load_prompts(str(path), streaming=streaming)) == ROWS
        return
    write(tmp_path / folder / "train-0.jsonl", lines(ROWS[:1]))
    write(tmp_path / folder / "train-1.jsonl", lines(ROWS[1:]))
    write(tmp_path / folder / "test.jsonl.gz", lines(ROWS[2:]))
    write(tmp_path / folder / "README.md", "# Data\n")
    assert list(load_prompts(str(tmp_path / folder), streaming=streaming)) == ROWS
    assert list(load_prompts(str(tmp_path / folder), split="test", streaming=streaming)) == ROWS[2:]
    with pytest.raises(
        ValueError, match=r"no split 'validation'\. Its splits are: train \(.*train-0.jsonl.*\); test \("
    ):
        load_prompts(str(tmp_path / folder), split="validation", streaming=streaming)


def test_folder_without_split_names_is_train(tmp_path, streaming):
    write(tmp_path / "a.jsonl", lines(ROWS[:1]))
    write(tmp_path / "b.jsonl", lines(ROWS[1:]))
    assert list(load_prompts(str(tmp_path), streaming=streaming)) == ROWS


def test_files_of_a_folder_that_belong_to_no_split_are_named(tmp_path, caplog):
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "extra.jsonl", lines(ROWS))
    assert len(load_prompts(str(tmp_path))) == 3
    assert re.search(r"belong to no split and are not read: .*extra\.jsonl\.$", caplog.text, re.MULTILINE)


def test_saved_dataset(tmp_path, streaming):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    dataset = load_prompts(str(tmp_path / "one"), split="test", streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == ROWS
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "two")
    assert list(load_prompts(str(tmp_path / "two"), split="test", streaming=streaming)) == ROWS[:1]
    with pytest.raises(ValueError, match=r"two has no split 'eval'\. Its splits are: train, test\."):
        load_prompts(str(tmp_path / "two"), split="eval", streaming=streaming)


def test_empty_saved_dataset(tmp_path, streaming):
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="The dataset saved in .*none is empty"):
        load_prompts(str(tmp_path / "none"), streaming=streaming)


MALFORMED = {
    "line.jsonl": (lines(ROWS) + '{"prompt": oops}\n', r"line\.jsonl: line 4 is no JSON object \(Expecting value"),
    "cut.jsonl.gz": ('{"prompt": "a"}\n\n{"prompt": "b\n', r"cut\.jsonl\.gz: line 3 is no JSON object \("),
    "strings.ndjson": ('"a"\n"b"\n', r"strings\.ndjson: line 1 is no JSON object \(but of type str\)"),
    "array.json": ('[\n{"prompt": "a"},\n{"prompt" "b"}\n]', r"array\.json: malformed JSON in line 3 \(Expecting ':'"),
    "no_bytes.jsonl": ("", r"There are no prompts in .*no_bytes\.jsonl: the file is empty"),
    "blank.jsonl": ("\n\n", r"blank\.jsonl: it holds no rows"),
    "blank.jsonl.gz": ("", r"blank\.jsonl\.gz: it holds no rows"),
    "numbers.json": ("[{}, 3]", r"numbers\.json.*(entry 2 is no JSON object|int)"),
    "empty.json": ("[]", r"empty\.json: it holds no rows"),
    "wide.csv": ("a,b\n1,2\n1,2,3\n", r"wide\.csv: line 3 has 3 fields, and the header has 2"),
    "header.csv": ("prompt\n", r"header\.csv.*(holds no rows|corresponds to no data)"),
    "text.parquet": ("nope", r"text\.parquet.*(?i:parquet)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_unreadable_files_are_named(tmp_path, name, streaming):
    content, message = MALFORMED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), streaming=streaming)


def test_a_file_that_is_not_gzip(tmp_path, streaming):
    (tmp_path / "x.jsonl.gz").write_text(lines(ROWS))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: Not a gzipped file"):
        load_prompts(str(tmp_path / "x.jsonl.gz"), streaming=streaming)


def test_the_malformed_file_of_several_is_the_one_that_is_named(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS))
    write(tmp_path / "b.jsonl", "{}\noops\n")
    with pytest.raises(ValueError, match=r"b\.jsonl: line 2 is no JSON object"):
        load_prompts(str(tmp_path))


def test_a_malformed_line_late_in_a_stream_is_named_when_it_is_reached(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS))
    write(tmp_path / "b.jsonl.gz", lines([{"prompt": "x" * 2000, "label": 0}] * 8000) + "oops\n")
    dataset = load_prompts(str(tmp_path / "*.jsonl*"), streaming=True)
    read = 0
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: line 8001 is no JSON object"):
        for _ in dataset:
            read += 1
    assert read > len(ROWS)


def test_missing_files_name_what_exists(tmp_path):
    write(tmp_path / "train.jsonl", lines(ROWS))
    (tmp_path / "sub").mkdir()
    for source in ("tarin.jsonl", "*.csv", "nothing"):
        with pytest.raises(ValueError, match=r"No file .*In .* there is: sub/, train\.jsonl\."):
            load_prompts(str(tmp_path / source))
    with pytest.raises(ValueError, match=r"No file .*The folder .*absent does not exist either"):
        load_prompts(str(tmp_path / "absent" / "x.jsonl"))
    with pytest.raises(ValueError, match=r"No file nowhere_to_be_found\.jsonl"):
        load_prompts("nowhere_to_be_found.jsonl")


def test_unknown_format(tmp_path):
    path = write(tmp_path / "prompts.txt", "a\n")
    with pytest.raises(ValueError, match=r"Cannot tell the format of .*prompts\.txt\. Known endings: \.json,"):
        load_prompts(str(path))


def test_folder_without_data_and_folder_of_two_formats(tmp_path):
    write(tmp_path / "notes.txt", "a\n")
    with pytest.raises(ValueError, match=r"holds no file ending in .*there is: notes\.txt\."):
        load_prompts(str(tmp_path))
    write(tmp_path / "a.csv", CSV)
    write(tmp_path / "a.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match=r"mixes csv and json files.*Give a glob, such as .*\*\.csv\."):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match=r"mixes csv and json files"):
        load_prompts(str(tmp_path / "a.*"))
    assert list(load_prompts(str(tmp_path / "*.csv"))) == TEXT_ROWS


def test_config_is_for_hub_datasets(tmp_path):
    path = write(tmp_path / "x.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match=r"`config` \('main'\) has no meaning for files"):
        load_prompts(str(path), config="main")


def test_hub_dataset_that_cannot_be_reached_is_named(streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Cannot load 'some/dataset', which is no file or folder here.*split 'train'"):
        load_prompts("some/dataset", streaming=streaming)
