"""Run files, their fields, and words of the command line that are wrong or hostile; numbers are in `cases_numbers`."""

from __future__ import annotations

from typing import Any

from faults.damage import all_of, removed
from faults.ground import run_file
from faults.harness import Fault, OneLine, Survived

BASE = run_file({})
LINE = f"run.yaml:{BASE.count(chr(10)) + 1}"
"""Where a line behind them stands."""


def text(name: str, data: str | bytes, *words: str) -> Fault:
    """A run file of its own, which is refused."""
    return Fault("run file", name, OneLine(2, *words), files={"run.yaml": data})


def line(name: str, more: str, *words: str) -> Fault:
    """One more line, which the message names."""
    return text(name, f"{BASE}{more}\n", LINE, *words)


def field(name: str, *words: str, **options: Any) -> Fault:
    """A field of the run file that is refused by its name."""
    return Fault("field", name, OneLine(2, *(f"`{option}`" for option in options), *words), options=options)


def words(name: str, more: tuple[str, ...], *said: str) -> Fault:
    return Fault("command line", name, OneLine(2, *said), words=more)


LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RUN_FILES = [
    text("empty", "", "run.yaml", "empty"),
    text("a list", "- a\n", "run.yaml", "mapping"),
    text("a text", "hello", "run.yaml"),
    text("no YAML", "a: [1, 2\nb: }", "run.yaml"),
    text("binary", bytes(range(256)), "run.yaml"),
    text("UTF-16", BASE.encode("utf-16"), "run.yaml", "UTF-8"),
    text("2 MB", BASE + "#" * 2_000_000, "run.yaml", "bytes"),
    text("billion laughs", BASE + LAUGHS, "run.yaml:", "20000 values"),
    text("two documents", f"{BASE}---\n{BASE}", LINE, "another document"),
    text("null for what is needed", BASE.replace("./policy", "null"), "model_name_or_path"),
    line("an alias of itself", "generation_kwargs: &a {b: *a}", "alias"),
    line("a merge of itself", "generation_kwargs: &a {<<: *a}", "alias"),
    line("minutes", "ddp_timeout: 1:30", "'1:30'"),
    line("deep", "generation_kwargs: " + "[" * 5_000, "levels deep"),
    line("deep and closed", "generation_kwargs: " + "[" * 20_000 + "]" * 20_000, "levels deep"),
    line("deep JSON", f"generation_kwargs: '{'[' * 20_000}'", "`generation_kwargs`"),
    text("a field twice", BASE + "seed: 1\nseed: 2\n", f"run.yaml:{int(LINE[9:]) + 1}", "`seed`", "twice"),
    line("no field", "max_stepz: 3", "max_steps"),
    line("a tag", "run_name: !!python/object:os.system x"),
    line("a call", "seed: !!python/object/apply:os.system ['touch owned']"),
    line("a tab", "\tseed: 1", "tabs"),
    text("a null character", BASE + "run_name: 'a\0'\n", "run.yaml", "#x0000"),
    line("a control character", 'run_name: "\\e[31m"', "`run_name`"),
    Fault("run file", "not there", OneLine(2, "run.yaml"), prepare=removed("run.yaml")),
    Fault(
        "run file",
        "a folder",
        OneLine(2, "run.yaml"),
        prepare=all_of(removed("run.yaml"), lambda folder: (folder / "run.yaml").mkdir()),
    ),
    Fault("run file", "a byte order mark", Survived(), files={"run.yaml": b"\xef\xbb\xbf" + BASE.encode()}),
    Fault("run file", "Windows' line ends", Survived(), files={"run.yaml": BASE.replace("\n", "\r\n")}),
]
FIELDS = [
    field("an attribute in a template", "attribute", prompt_template="{prompt.__class__}"),
    field("a width in a template", "width", prompt_template="{prompt:>1000000000}"),
    field("an unknown column in a template", "columns", prompt_template="{nope}"),
    field("a template without a column", prompt_template="always the same"),
    field("an open brace in a template", prompt_template="{prompt"),
    field("half a template", prompt_template="{prompt!z}"),
    field("the model's folder as output", "`model_name_or_path`", output_dir="policy"),
    field("the root as output", "root", output_dir="/"),
    field("a file as output", "file", output_dir="data.jsonl"),
    field("blanks around a name", "white space", dataset_name="data.jsonl "),
    field("an empty name", "empty", dataset_name=""),
    field("a missing plugin", "none.py", plugins=["none.py"]),
    Fault("field", "a judge without a model", OneLine(2, "`judge: llm`", "`model`"), options={"judge": "llm"}),
    field("no split", dataset_train_split=""),
    field("no rows", dataset_limit=0),
    field("a type that is none", dataset_types={"prompt": 5}),
    field("a word for a number", seed="five"),
    field("a list for a number", seed=[1]),
    field("yes for a number", seed=True),
    field("maybe for yes", bf16_full_eval="maybe"),
    field("a mapping for a list", reward_weights={"a": 1}),
    field("a negative time limit", ddp_timeout=-5),
    field("negative processes", dataset_num_proc=-1),
    field("a negative reward_timeout", reward_timeout=-1),
    Fault(
        "field",
        "an evaluation of nothing",
        OneLine(2, "eval_dataset"),
        options={"eval_strategy": "steps", "eval_steps": 1},
    ),
    Fault("field", "no processes", Survived(), options={"dataset_num_proc": 0}),
]
WORDS = [
    words("a long dash", ("—max_steps", "5"), "long dash"),
    words("minutes", ("--max_steps", "1:30"), "'1:30'"),
    words("an unknown field", ("--max_stepz", "5"), "`max_steps`"),
    words("no value", ("--max_steps",), "max_steps"),
    words("two values", ("--max_steps", "3", "4"), "max_steps"),
    words("another run file", ("--config", "run.yaml"), "run.yaml"),
    words("bytes that are no text", ("--run_name", "\udcff"), "`run_name`"),
    Fault("command line", "a date", Survived(), words=("--run_name", "2024-13-45")),
]
FAULTS = [*RUN_FILES, *FIELDS, *WORDS]
