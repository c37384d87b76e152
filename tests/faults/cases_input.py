"""Data files, rows, templates, run files and words of the command line that are wrong or hostile."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from faults.harness import Fault, OneLine, Survived

ROWS = [{"prompt": f"w{i} w{i + 1} w2"} for i in range(8)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
BASE = """model_name_or_path: ./policy
dataset_name: data.jsonl
reward_funcs: feedback.py:words
output_dir: out
use_cpu: true
report_to: none
max_steps: 4
"""


def data(name: str, content: str | bytes, *words: str, file: str = "x.jsonl", **options: Any) -> Fault:
    """A data file that is refused in one line with its name, or with other words."""
    return Fault(
        "data file",
        name,
        OneLine(2, *(words or (file,))),
        files={file: content},
        options={"dataset_name": file, **options},
    )


def row(name: str, value: Any, *words: str, **options: Any) -> Fault:
    """The third row's prompt is ``value``; the line names the row."""
    rows = [*ROWS[:2], {"prompt": value}]
    content = "".join(json.dumps(each) + "\n" for each in rows)
    return data(name, content, "Row 2 of train_dataset", *words, **options)


def chat(name: str, message: dict[str, Any], *words: str) -> Fault:
    """The third row is a conversation of one ``message``."""
    rows = [{"prompt": [{"role": "user", "content": "w1 w2"}]}] * 2 + [{"prompt": [message]}]
    content = "".join(json.dumps(each) + "\n" for each in rows)
    return data(name, content, "Row 2 of train_dataset", *words)


def run_file(name: str, text: str | bytes, *words: str) -> Fault:
    """A run file of its own, which is refused with its name and line."""
    return Fault("run file", name, OneLine(2, *words), files={"run.yaml": text})


def field(name: str, *words: str, **options: Any) -> Fault:
    """A field of the run file that is refused by its name."""
    return Fault("field", name, OneLine(2, *(f"`{option}`" for option in options), *words), options=options)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.jsonl")


def zero(folder: Path) -> None:
    os.symlink("/dev/zero", folder / "x.jsonl")


def copied(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / "data.jsonl").read_bytes())


LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
PACKED = gzip.compress(LINES.encode())

FILES = [
    data("a key twice", '{"prompt": "w1", "prompt": "w2"}\n', "x.jsonl", "line 1", "twice"),
    data("1e400", '{"prompt": "w1", "n": 1e400}\n', "x.jsonl", "1e400", "beyond the range"),
    data("20,000 levels", '{"prompt": ' + "[" * 20_000 + "]" * 20_000 + "}\n", "x.jsonl", "levels deep"),
    data("20,000 levels in a stream", '{"a": ' * 20_000, "x.jsonl", "levels deep", dataset_streaming=True),
    data("1500 columns", json.dumps({f"k{i}": 1 for i in range(1500)}), "more than 1000 columns"),
    data("UTF-16", LINES.encode("utf-16"), "x.jsonl", "UTF-16"),
    data("Latin-1", '{"prompt": "é"}\n'.encode("latin-1"), "x.jsonl", "not in UTF-8"),
    data("gzip without its ending", PACKED, "x.jsonl", "compressed with gzip"),
    data("truncated gzip", PACKED[:-9], file="x.jsonl.gz"),
    data("flipped bits in gzip", PACKED[:20] + b"\xff\xff\xff" + PACKED[23:], file="x.jsonl.gz"),
    data("empty", "", "x.jsonl", "empty"),
    data("only a header", "prompt\n", "x.csv", "no rows", file="x.csv"),
    data("a column twice", "prompt,a,a\nw1,1,2\n", "x.csv", "'a' more than once", file="x.csv"),
    data("a short row", "prompt,a\nw1,1\nw2\n", "x.csv", "line 3 has 1 fields", file="x.csv"),
    data("an open quote", 'prompt,a\n"w1,1\nw2,2\n', "x.csv", "line 3", file="x.csv"),
    data("semicolons", "prompt;a\nw1;1\n", "No column holds the prompts", "prompt;a", file="x.csv"),
    data("no Parquet", "nope", file="x.parquet"),
    data("a wrong ending", LINES, "x.txt", "Known endings", file="x.txt"),
    Fault("data file", "a pipe", OneLine(2, "x.jsonl", "pipe"), prepare=pipe, options={"dataset_name": "x.jsonl"}),
    Fault("data file", "/dev/zero", OneLine(2, "x.jsonl", "device"), prepare=zero, options={"dataset_name": "x.jsonl"}),
    *(
        Fault("data file", f"named {name}", Survived(like={}), prepare=lambda folder, name=name: copied(folder, name),
              options={"dataset_name": name})
        for name in ("data[1].jsonl", "a*b.jsonl", "with space.jsonl")
    ),
]  # fmt: skip


ROW_FAULTS = [
    row("zero-width characters", "\u200b\u200d", "no visible character"),
    row("half of a character", "w1 \ud800", "half of a character"),
    row("2 MB", "w1 " * 700_000, "characters"),
    row("null", None, "missing (null)"),
    row("a number", 5, "of type int"),
    row("messages as text", '[{"role": "user", "content": "w1"}]', "written as text"),
    chat("User", {"role": "User", "content": "w1"}, "'User'", "do you mean 'user'"),
    chat("no role", {"content": "w1"}, "no `role`"),
    chat("no content", {"role": "user"}, "no `content`"),
    chat("an image", {"role": "user", "content": [{"type": "image"}]}, "'image'"),
    chat("two parts", {"role": "user", "content": [{"type": "text", "text": t} for t in ("w1", "w2")]}, "2 parts"),
    data(
        "a row's own template",
        "".join(
            json.dumps({"prompt": [{"role": "user", "content": "w1"}], "chat_template_kwargs": {"chat_template": "x"}})
            + "\n"
            for _ in range(8)
        ),
        "hold chat_template",
    ),
    data("null in a template", '{"a": "w1"}\n{"a": null}\n', "Row 1", "`a`", prompt_template="{a}"),
]
FIELDS = [
    field("an attribute in a template", "attribute", prompt_template="{prompt.__class__}"),
    field("a width in a template", "width", prompt_template="{prompt:>1000000000}"),
    field("an unknown column in a template", "columns", prompt_template="{nope}"),
    field("the model's folder as output", "`model_name_or_path`", output_dir="policy"),
    field("the root as output", "root", output_dir="/"),
    field("a file as output", "file", output_dir="data.jsonl"),
    field("blanks around a name", "white space", dataset_name="data.jsonl "),
    field("an empty name", "empty", dataset_name=""),
    field("a negative time limit", ddp_timeout=-5),
    field("negative processes", dataset_num_proc=-1),
    field("no split", dataset_train_split=""),
    field("a type that is none", dataset_types={"prompt": 5}),
    Fault("field", "no processes", Survived(), options={"dataset_num_proc": 0}),
]
RUN_FILES = [
    run_file("billion laughs", BASE + LAUGHS, "run.yaml:", "20000 values"),
    run_file("an alias of itself", BASE + "generation_kwargs: &a {b: *a}\n", "run.yaml:8", "alias"),
    run_file("a merge of itself", BASE + "generation_kwargs: &a {<<: *a}\n", "run.yaml:8", "alias"),
    run_file("minutes", BASE + "ddp_timeout: 1:30\n", "run.yaml:8", "'1:30'"),
    run_file("deep", BASE + "generation_kwargs: " + "[" * 5_000, "run.yaml:8", "levels deep"),
    run_file("deep JSON", BASE + f"generation_kwargs: '{'[' * 20_000}'\n", "run.yaml:8", "`generation_kwargs`"),
    run_file("a field twice", BASE + "seed: 1\nseed: 2\n", "run.yaml:9", "`seed`", "twice"),
    run_file("two documents", BASE + "---\n" + BASE, "run.yaml:8", "another document"),
    run_file("a tag", BASE + "run_name: !!python/object:os.system x\n", "run.yaml:8"),
    run_file("a tab", BASE + "\tseed: 1\n", "run.yaml:8", "tabs"),
    run_file("a null character", BASE + "run_name: 'a\0'\n", "run.yaml", "#x0000"),
    run_file("a control character", BASE + 'run_name: "\\e[31m"\n', "run.yaml:8", "`run_name`"),
    run_file("UTF-16", BASE.encode("utf-16"), "run.yaml", "UTF-8"),
    run_file("empty", "", "run.yaml", "empty"),
    run_file("a list", "- a\n", "run.yaml", "mapping"),
    run_file("2 MB", BASE + "#" * 2_000_000, "run.yaml", "bytes"),
]
WORDS = [
    Fault("command line", "a long dash", OneLine(2, "long dash"), words=("—max_steps", "5")),
    Fault("command line", "minutes", OneLine(2, "'1:30'"), words=("--max_steps", "1:30")),
    Fault("command line", "an unknown field", OneLine(2, "`max_steps`"), words=("--max_stepz", "5")),
    Fault("command line", "bytes that are no text", OneLine(2, "`run_name`"), words=("--run_name", "\udcff")),
    Fault("command line", "a date", Survived(), words=("--run_name", "2024-13-45")),
]
FAULTS = [*FILES, *ROW_FAULTS, *FIELDS, *RUN_FILES, *WORDS]
