"""Data files, their rows and prompt templates that are wrong or hostile."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.harness import ANY, Either, Ending, Fault, OneLine, Survived

GOOD: list[object] = [{"prompt": f"w{i} w{i + 1} w2"} for i in range(8)]
CSV = "prompt,year\nw1 w2,1\nw3,2\nw4,3\nw5,4\n"


def lines(rows: Sequence[object]) -> str:
    """A file of JSON lines; a row that is a text stands there as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


PACKED = gzip.compress(lines(GOOD * 20).encode())


def file(name: str, content: str | bytes, *words: str, to: str = "x.jsonl", ending: Ending | None = None, **options):
    """A data file that is refused in one line with its name, or with other words."""
    ending = ending or OneLine(2, *(words or (to,)))
    return Fault("data", name, ending, files={to: content}, options={"dataset_name": to, **options})


def rows(name: str, rows: Sequence[object], *words: str, ending: Ending | None = None, **options: Any) -> Fault:
    """A data file of these rows."""
    return file(name, lines(rows), *words, ending=ending, **options)


def prompt(name: str, value: Any, *words: str, **options: Any) -> Fault:
    """The third row's prompt is ``value``; the line names the row."""
    return rows(name, [*GOOD[:2], {"prompt": value}], "Row 2 of train_dataset", *words, **options)


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"prompt": list(messages), **columns}


def message(name: str, message: dict[str, Any], *words: str) -> Fault:
    """The third row is a conversation of one ``message``."""
    content = [chat({"role": "user", "content": "w1 w2"})] * 2 + [chat(message)]
    return rows(name, content, "Row 2 of train_dataset", *words)


def there(name: str, prepare: Any, path: str, ending: Ending, **options: Any) -> Fault:
    """What is at a path is no file that `files` could hold."""
    return Fault("data", name, ending, prepare=prepare, options={"dataset_name": path, **options})


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.jsonl")


def zero(folder: Path) -> None:
    os.symlink("/dev/zero", folder / "x.jsonl")


def nothing(folder: Path) -> None:
    pass


def copied(name: str):
    return lambda folder: (folder / name).write_bytes((folder / "data.jsonl").read_bytes()) and None


FILES = [
    file("a key twice", '{"prompt": "w1", "prompt": "w2"}\n', "x.jsonl", "line 1", "twice"),
    file("1e400", '{"prompt": "w1", "n": 1e400}\n', "x.jsonl", "1e400", "beyond the range"),
    file("20,000 levels", '{"prompt": ' + "[" * 20_000 + "]" * 20_000 + "}\n", "x.jsonl", "levels deep"),
    file("20,000 levels in a stream", '{"a": ' * 20_000, "x.jsonl", "levels deep", dataset_streaming=True),
    file("20,000 levels of JSON", "[" * 20_000 + "]" * 20_000, to="x.json"),
    file("1500 columns", json.dumps({f"k{i}": 1 for i in range(1500)}), "more than 1000 columns"),
    file("UTF-16", lines(GOOD).encode("utf-16"), "x.jsonl", "UTF-16"),
    file("Latin-1", '{"prompt": "é"}\n'.encode("latin-1"), "x.jsonl", "not in UTF-8"),
    file("gzip without its ending", PACKED, "x.jsonl", "compressed with gzip"),
    file("truncated gzip", PACKED[:-9], to="x.jsonl.gz"),
    file("half of a gzip", PACKED[: len(PACKED) // 2], to="x.jsonl.gz"),
    file("no gzip", "not zipped", to="x.jsonl.gz"),
    file("flipped bits in gzip", PACKED[:20] + b"\xff\xff\xff" + PACKED[23:], to="x.jsonl.gz"),
    file("empty", "", "x.jsonl", "empty"),
    file("a line that is no JSON", lines([*GOOD, "{prompt: "]), "x.jsonl", "9"),
    file("a line that is no object", lines([*GOOD, "[1, 2]"]), "x.jsonl", "9"),
    file("JSON that ends early", '[{"prompt": "w1"}, {"prom', to="x.json"),
    file("JSON of something else", '{"version": 1}', to="x.json"),
    file("only a header", "prompt\n", "x.csv", "no rows", to="x.csv"),
    file("a column twice", "prompt,a,a\nw1,1,2\n", "x.csv", "'a' more than once", to="x.csv"),
    file("the prompts' column twice", CSV.replace("year", "prompt"), "x.csv", "prompt", to="x.csv"),
    file("a short row", "prompt,a\nw1,1\nw2\n", "x.csv", "line 3 has 1 fields", to="x.csv"),
    file("a long row", CSV + "w1,2,3\n", to="x.csv"),
    file("an open quote", 'prompt,a\n"w1,1\nw2,2\n', "x.csv", "line 3", to="x.csv"),
    file("semicolons", "prompt;a\nw1;1\n", "No column holds the prompts", "prompt;a", to="x.csv"),
    file("no Parquet", "nope", to="x.parquet"),
    file("half of a Parquet", b"PAR1" + b"\0" * 20, to="x.parquet"),
    file("an unknown ending", lines(GOOD), "x.txt", "Known endings", to="x.txt"),
    file("a word's document", "x", to="x.docx"),
    there("a pipe", pipe, "x.jsonl", OneLine(2, "x.jsonl", "pipe")),
    there("a link to /dev/zero", zero, "x.jsonl", OneLine(2, "x.jsonl", "device")),
    there("/dev/zero", nothing, "/dev/zero", OneLine(2, "/dev/zero")),
    there("not there", nothing, "nowhere.jsonl", OneLine(2, "nowhere.jsonl")),
    there("an empty folder", lambda folder: (folder / "x").mkdir(), "./x", OneLine(2, "x")),
    there("a pattern for nothing", nothing, "none*.jsonl", OneLine(2, "none*.jsonl")),
    *(
        there(f"named {name}", copied(name), name, Survived(like={}))
        for name in ("data[1].jsonl", "a*b.jsonl", "with space.jsonl")
    ),
]
ROWS = [
    rows("no prompts", [{"text": "w1"}] * 4, "prompt"),
    prompt("zero-width characters", "\u200b\u200d", "no visible character"),
    prompt("an empty prompt", "", "empty"),
    prompt("a prompt of spaces", "  \n\t"),
    prompt("half of a character", "w1 \ud800", "half of a character"),
    prompt("2 MB", "w1 " * 700_000, "characters"),
    prompt("null", None, "missing (null)"),
    prompt("a number", 5, "of type int"),
    prompt("messages as text", '[{"role": "user", "content": "w1"}]', "written as text"),
    prompt("no messages", []),
    message("User", {"role": "User", "content": "w1"}, "'User'", "do you mean 'user'"),
    message("a role of its own", {"role": "wizard", "content": "w1"}, "wizard"),
    message("no role", {"content": "w1"}, "no `role`"),
    message("no content", {"role": "user"}, "no `content`"),
    message("an image", {"role": "user", "content": [{"type": "image"}]}, "'image'"),
    message("two parts", {"role": "user", "content": [{"type": "text", "text": t} for t in ("w1", "w2")]}, "2 parts"),
    rows(
        "a row's own template",
        [chat({"role": "user", "content": "w1"}, chat_template_kwargs={"chat_template": "x"})] * 8,
        "hold chat_template",
    ),
    rows("null in a template", [{"a": "w1"}, {"a": None}], "Row 1", "`a`", prompt_template="{a}"),
    rows("a number of 5000 digits", ['{"prompt": "w1", "n": 1' + "0" * 5000 + "}"] * 4),
    rows(
        "prompts of two kinds",
        [*GOOD, chat({"role": "user", "content": "w1"})],
        ending=Either(OneLine(2, "prompt"), Survived(like=ANY)),
    ),
    rows(
        "the assistant last",
        [chat({"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"})] * 4,
        ending=Either(OneLine(2, "assistant"), Survived(like=ANY)),
    ),
    rows("a NUL", [*GOOD, {"prompt": "w1 \x00 w2"}], ending=Either(OneLine(2, "prompt"), Survived(like=ANY))),
    rows(
        "a number beyond 64 bits",
        [{"prompt": "w1", "n": 2**70}] * 4,
        ending=Either(OneLine(2, "n"), Survived(like=ANY)),
    ),
    rows(
        "NaN in a column",
        ['{"prompt": "w1 w2", "n": NaN}'] * 4,
        ending=Either(OneLine(2, "x.jsonl"), Survived(like=ANY)),
    ),
    rows(
        "a column of two types",
        [{"prompt": "w1", "n": 1}, {"prompt": "w2", "n": "x"}] * 4,
        ending=Either(OneLine(2, "n"), Survived(like=ANY)),
    ),
    rows("a prompt longer than all", [*GOOD, {"prompt": "w1 " * 3000}], ending=Survived(like=ANY)),
]
FAULTS = [*FILES, *ROWS]
