"""Files that would be read as something else, crash, hang or eat the memory: one line that names the file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from online_dpo.config import json_text
from online_dpo.data import file_rows, load
from online_dpo.data.load import load_prompts

ROW = b'{"prompt": "a", "x": 1}\n'
ROWS = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ZIPPED = gzip.compress(LINES)


def parquet(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


MALFORMED: dict[str, tuple[bytes, str]] = {
    # values
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}\n', "line 1: the key 'prompt' stands twice in one object"),
    "twice.json": (b'[{"prompt": "a", "m": {"k": 1, "k": 2}}]', "the key 'k' stands twice in one object"),
    "beyond.jsonl": (ROW + b'{"x": 1e400}\n', "line 2: the number 1e400 is beyond the range of a float"),
    "digits.jsonl": (b'{"id": 12345678901234567.25}\n', "line 1: the number 12345678901234567.25 has more digits than"),
    "long.jsonl": (b'{"id": ' + b"9" * 5000 + b"}\n", "line 1: a number has 5000 digits"),
    "long.json": (b'[{"id": ' + b"9" * 5000 + b"}]", "a number has 5000 digits"),
    "deep.jsonl": (
        b'{"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        "line 1: it is nested more than 100 levels deep",
    ),
    "deep.json": (b'[{"x": ' + b'{"a": ' * 20_000 + b"1" + b"}" * 20_001 + b"]", "it is nested more than 100 levels"),
    "open.jsonl": (b"[" * 200_000, "it is nested more than 100 levels deep"),
    # forms
    "pretty.jsonl": (json.dumps(ROWS[0], indent=1).encode(), "a file holds one object a line, or one array of objects"),
    "two.jsonl": (
        b'{"prompt": "a"} {"prompt": "b"}\n',
        "line 1 is no JSON object (Extra data); a file holds one object",
    ),
    "commas.jsonl": (b'{"prompt": "a"},\n', "line 1 is no JSON object (Extra data)"),
    "end.json": (b'[{"prompt": "a"},]', "malformed JSON in line 1"),
    "null.jsonl": (b"null\n", "line 1 is no JSON object (but of type NoneType)"),
    "half.jsonl": (b'{"\\ud800": "x"}\n', "the name of the column '\\ud800' holds half of a character"),
    "names.jsonl": (
        b"{" + b", ".join(b'"k%d": 1' % i for i in range(1500)) + b"}\n",
        "more than 1000 columns; the name",
    ),
    # encodings and formats
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
    "utf16le.csv": ("prompt\na\n".encode("utf-16-le"), "it is no text, or not in UTF-8"),
    "latin.jsonl": ('{"prompt": "é"}\n'.encode("latin-1"), "the text is not in UTF-8 ("),
    "latin.csv": ("prompt\né\n".encode("latin-1"), "the text is not in UTF-8 ("),
    "surrogate.jsonl": (b'{"prompt": "\xed\xa0\x80"}\n', "the text is not in UTF-8 ("),
    "binary.jsonl": (bytes(range(256)), "it is no text, or not in UTF-8"),
    "gz.jsonl": (ZIPPED, "it is compressed with gzip; give its name the ending .gz"),
    "xz.csv": (lzma.compress(b"prompt\na\n"), "it is compressed with xz; decompress it, or use gzip"),
    "bz.csv": (bz2.compress(b"prompt\na\n"), "it is compressed with bzip2"),
    "zst.jsonl": (b"\x28\xb5\x2f\xfd\x00\x00", "it is compressed with zstd"),
    "zip.jsonl": (b"PK\x03\x04aaaa", "it is a zip archive; unpack it"),
    "parquet.csv": (b"PAR1aaaa", "it is a Parquet file; give its name the ending .parquet"),
    # compressed
    "cut.jsonl.gz": (ZIPPED[:-9], "Compressed file ended before the end-of-stream marker was reached"),
    "bit.jsonl.gz": (ZIPPED[:15] + b"\xff\xff\xff" + ZIPPED[18:], "Error -3 while decompressing data"),
    "bit.csv.gz": (ZIPPED[:15] + b"\xff\xff\xff" + ZIPPED[18:], "Error -3 while decompressing data"),
    "sum.jsonl.gz": (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], "CRC check failed"),
    "plain.csv.gz": (b"prompt\na\n", "Not a gzipped file"),
    "nothing.csv.gz": (gzip.compress(b""), "it holds no rows"),
    # csv
    "twice.csv": (b"prompt,a,a\n1,2,3\n", "its header has 'a' more than once; rename the columns"),
    "short.csv": (b"prompt,b\n1,2\n3\n", "line 3 has 1 fields, and the header has 2; a field with a separator"),
    "wide.csv": (b"prompt,b\n1,2\n3,4,5\n", "line 3 has 3 fields, and the header has 2"),
    "quote.csv": (b'prompt,b\n"hello,2\nworld,3\n', "line 3: unexpected end of data"),
    "after.csv": (b'prompt,b\n"he"llo,2\n', "line 2: ',' expected after '\"'"),
    "columns.csv": (b",".join(b"c%d" % i for i in range(20_000)) + b"\n", "there are more than 1000 columns"),
    "blank.csv": (b"\n \n\n", "it holds no rows"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_gets_one_line_with_its_name(tmp_path: Path, name: str, streaming: bool) -> None:
    content, message = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_prompts(str(tmp_path / name), streaming=streaming)
    said = str(caught.value)
    assert said.startswith("Cannot read ") and name in said and message in said and "\n" not in said


def test_values_that_are_right_are_left_alone(tmp_path: Path, streaming: bool) -> None:
    text = '{"prompt": "a\\u0000b", "big": 123456789012345678901234567890, "f": 0.1234567890123456789, "nan": NaN}\n'
    (tmp_path / "x.jsonl").write_text(text)
    [row] = load_prompts(str(tmp_path / "x.jsonl"), streaming=streaming)
    assert repr(row) == repr(json.loads(text))
    (tmp_path / "x.csv").write_bytes(b'prompt,b\rhe"llo,\r"x\ny",z\r')
    assert list(load_prompts(str(tmp_path / "x.csv"), streaming=streaming)) == [
        {"prompt": 'he"llo', "b": ""},
        {"prompt": "x\ny", "b": "z"},
    ]


@pytest.mark.parametrize(
    "name", ["data[1].jsonl", "a*b.jsonl", "q?.jsonl", "~t.jsonl", "$HOME.jsonl", "ü\n.jsonl", "UP.JSONL"]
)
def test_signs_in_the_name_of_a_file_are_signs(tmp_path: Path, name: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(LINES)
    (tmp_path / "data1.jsonl").write_bytes(ROW)
    assert list(load_prompts(str(tmp_path / name), streaming=streaming)) == ROWS


def test_a_folder_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]" / "train.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"its name has \*, \? or \[ in it"):
        load_prompts(str(tmp_path / "d[1]"))
    assert list(load_prompts(str(tmp_path / "d[1]" / "train.jsonl"))) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz", ".parquet"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, suffix: str, streaming: bool) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    os.symlink("/dev/zero", tmp_path / f"zero{suffix}")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=f"{name}{suffix} is no file but a pipe or a device"):
            load_prompts(str(tmp_path / f"{name}{suffix}"), streaming=streaming)
    os.symlink(f"loop{suffix}", tmp_path / f"loop{suffix}")
    with pytest.raises(ValueError, match=f"No file .*loop{suffix}"):
        load_prompts(str(tmp_path / f"loop{suffix}"), streaming=streaming)


@pytest.mark.parametrize("source", ["", " ", "x.jsonl ", "a\0.jsonl", "x" * 5000 + ".jsonl", "~nobody-at-all/x.jsonl"])
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(ValueError, match="^(The source |No file )"):
        load_prompts(source)


@pytest.mark.parametrize("split", ["", " train", "train[5:]", "train[:0]", "train[", "train[a:b]"])
def test_splits_that_are_none(tmp_path: Path, split: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="^(The split |Cannot read )"):
        load_prompts(str(tmp_path / "x.jsonl"), split=split)
    with pytest.raises(ValueError, match="`limit` must be at least 1; it is 1.5"):
        load_prompts(str(tmp_path / "x.jsonl"), limit=1.5)  # pyright: ignore[reportArgumentType]


def test_a_small_file_that_unpacks_to_an_endless_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE", 1000)
    monkeypatch.setattr(file_rows, "MAX_ARRAY", 1000)
    for name, start, message in [
        ("x.jsonl.gz", b'{"prompt": "', "line 1 is longer than 1000 characters"),
        ("x.csv.gz", b'prompt\n"', "line 2 is longer than 1000 characters"),
        ("x.json.gz", b'[{"prompt": "', "it is one array of more than 1000 characters; write one object a line"),
    ]:
        (tmp_path / name).write_bytes(gzip.compress(start + b"a" * 10**6))
        with pytest.raises(ValueError, match=message):
            load_prompts(str(tmp_path / name), streaming=streaming)


def test_a_text_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"prompt\n{'a' * 200_000}\n")
    assert len(load_prompts(str(tmp_path / "x.csv"))[0]["prompt"]) == 200_000


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(LINES)
    store = load._store

    def write_and_store(*given: Any) -> Dataset:
        file.write_bytes(LINES + b'{"prompt": "c", "x": "no number"}\n')
        return store(*given)

    monkeypatch.setattr(load, "_store", write_and_store)
    with pytest.raises(ValueError, match=r"x\.jsonl has changed while it was read"):
        load_prompts(str(file))


def test_parquet_files(tmp_path: Path, streaming: bool) -> None:
    whole = parquet(tmp_path / "x.parquet", prompt=["a", "b"], x=[1, 2])
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "bits.parquet").write_bytes(whole[:30] + b"\xff" * 60 + whole[90:])
    parquet(tmp_path / "none.parquet", prompt=pa.array([], pa.string()))
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "two.parquet")
    for name, message in {
        "cut": "Parquet magic bytes not found in footer",
        "bits": "",
        "none": "it holds no rows",
        "two": "'prompt' more than once; rename the columns",
    }.items():
        with pytest.raises(ValueError) as caught:
            list(load_prompts(str(tmp_path / f"{name}.parquet"), streaming=streaming))
        said = str(caught.value)
        assert said.startswith("Cannot read ") and message in said and "\n" not in said


def test_a_saved_dataset_that_is_broken(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name, content in {"state.json": "{}", "dataset_info.json": "{"}.items():
        (tmp_path / "saved" / name).write_text(content)
        with pytest.raises(ValueError, match="Cannot read the dataset saved in .*saved: "):
            load_prompts(str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", ["dictionary", "null", "", "list<int>", "int6"])
def test_types_that_no_text_can_have(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"prompt,y\na,1\n")
    with pytest.raises(ValueError, match=f"Column `y` has the type '{kind}', which does not exist"):
        load_prompts(str(tmp_path / "x.csv"), types={"y": kind})


def test_a_number_beyond_the_range_of_its_type(tmp_path: Path) -> None:
    for value, kind in (("1e400", "float64"), ("99999999999999999999", "int64"), ("300", "int8")):
        (tmp_path / "x.csv").write_text(f"prompt,y\na,{value}\n")
        with pytest.raises(ValueError, match=f"row 1 has '{value}' in column `y`, which is no {kind}"):
            load_prompts(str(tmp_path / "x.csv"), types={"y": kind})
