"""Hostile and mistaken run files, data files and model folders."""

from __future__ import annotations

import gzip
import json

from faults.damage import (
    Change,
    all_of,
    cut_in_half,
    edited,
    edited_json,
    edited_tensors,
    emptied,
    removed,
    written,
    zeroed,
)
from faults.ground import run_file
from faults.harness import ANY, Either, Ending, Fault, OneLine, Survived

TEXT = run_file({})


def text(name: str, data: str | bytes, *words: str, ending: Ending | None = None) -> Fault:
    return Fault("run file", name, ending or OneLine(2, *words), files={"run.yaml": data})


def field(name: str, line: str, *words: str, ending: Ending | None = None) -> Fault:
    """One more line."""
    return text(name, TEXT + line + "\n", *words, ending=ending)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

RUN_FILES = [
    text("is empty", "", "run.yaml"),
    text("is no mapping", "- a\n- b\n", "run.yaml"),
    text("is a text", "hello", "run.yaml"),
    text("is no YAML", "a: [1, 2\nb: }", "run.yaml"),
    text("is binary", bytes(range(256)), "run.yaml"),
    text("is UTF-16", TEXT.encode("utf-16"), "run.yaml", ending=Either(OneLine(2, "run.yaml"), Survived())),
    text("begins with a byte order mark", b"\xef\xbb\xbf" + TEXT.encode(), ending=Survived()),
    text("has Windows' line ends", TEXT.replace("\n", "\r\n"), ending=Survived()),
    text("is two documents", TEXT + "---\n" + TEXT, "run.yaml"),
    text("is 30 aliases deep", TEXT + BOMB, "run.yaml"),
    text("holds itself", TEXT + "model_init_kwargs: &a {b: *a}\n", "run.yaml"),
    text("is nested 20,000 deep", TEXT + "stop: " + "[" * 20_000 + "]" * 20_000, "run.yaml"),
    text("makes a Python object", TEXT + "seed: !!python/object/apply:os.system ['touch owned']\n", "run.yaml"),
    text("is 5 MB of comments", TEXT + "# x\n" * 1_250_000, ending=Survived()).but(quick=False),
    field("names a field twice", "max_steps: 3", "max_steps"),
    field("names no field", "max_stepz: 3", "max_steps"),
    field("has a number with colons", "warmup_steps: 1:30", "warmup_steps"),
    field("has a number as text", "seed: 'five'", "seed"),
    field("has a list for a number", "seed: [1]", "seed"),
    field("has a mapping for a list", "reward_weights: {a: 1}", "reward_weights"),
    text("has null for what is needed", run_file({}).replace("./policy", "null"), "model_name_or_path"),
    field("has yes for a number", "seed: yes", "seed"),
    field("has no processes for data", "dataset_num_proc: 0", "dataset_num_proc"),
    field("has a negative time limit", "ddp_timeout: -5", "ddp_timeout"),
    field("has a seed of 65 bits", f"seed: {2**65}", "seed"),
    field("looks into objects with its template", "prompt_template: '{x.__class__}'", "prompt_template"),
    field("has an unknown column in its template", "prompt_template: '{questoin}'", "questoin"),
    field("has a template without a column", "prompt_template: 'always the same'", "prompt_template"),
    field("has an open brace in its template", "prompt_template: '{prompt'", "prompt_template"),
    field("has half a template", "prompt_template: '{prompt!z}'", "prompt_template"),
    field("names a missing plugin", "plugins: [none.py]", "none.py"),
    field("has a judge beside a reward", "judge: llm", "judge"),
    field(
        "has a control character", 'run_name: "a\\0b"', "run_name", ending=Either(OneLine(2, "run_name"), Survived())
    ),
    field("evaluates on nothing", "eval_strategy: steps\neval_steps: 1", "eval"),
    field("limits the data to nothing", "dataset_limit: 0", "dataset_limit"),
    text("wants more tokens than the model has", run_file(dict(max_length=100_000, max_new_tokens=90_000)), "max"),
    field("asks for a device that is not there", "bf16_full_eval: maybe", "bf16_full_eval"),
    Fault("run file", "is not there", OneLine(2, "run.yaml"), prepare=removed("run.yaml")),
    Fault(
        "run file",
        "is a folder",
        OneLine(2, "run.yaml"),
        prepare=all_of(removed("run.yaml"), lambda folder: (folder / "run.yaml").mkdir()),
    ),
    Fault("run file", "is overridden by no field", OneLine(2, "max_stepz"), words=("--max_stepz", "3")),
    Fault("run file", "is overridden by no value", OneLine(2, "max_steps"), words=("--max_steps",)),
    Fault("run file", "is overridden by two values", OneLine(2, "max_steps"), words=("--max_steps", "3", "4")),
    Fault("run file", "stands beside another", OneLine(2, "run.yaml"), words=("--config", "run.yaml")),
]


def rows(name: str, lines: list[object], *words: str, ending: Ending | None = None, **options) -> Fault:
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return Fault("data", name, ending or OneLine(2, *words), files={"data.jsonl": data}, options=options)


def file(name: str, path: str, data: bytes | str, *words: str, ending: Ending | None = None, **options) -> Fault:
    options = {"dataset_name": path, **options}
    return Fault("data", name, ending or OneLine(2, *words), files={path: data}, options=options)


GOOD: list[object] = [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w4 w5"}, {"prompt": "w6"}]
CSV = "prompt,year\nw1 w2,1\nw3,2\nw4,3\nw5,4\n"
ZIPPED = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD * 50).encode())


def chat(*messages: dict) -> dict:
    return {"prompt": list(messages)}


DATA = [
    rows("is empty", [], "data.jsonl"),
    rows("has a line that is no JSON", [*GOOD, "{prompt: "], "data.jsonl", "5"),
    rows("has a line that is no object", [*GOOD, "[1, 2]"], "data.jsonl", "5"),
    rows("has no prompts", [{"text": "w1"}] * 4, "prompt"),
    rows("has a prompt that is null", [*GOOD, {"prompt": None}], "prompt"),
    rows("has a prompt that is a number", [*GOOD, {"prompt": 3}], "prompt"),
    rows("has an empty prompt", [*GOOD, {"prompt": ""}], "prompt"),
    rows("has a prompt of spaces", [*GOOD, {"prompt": "  \n\t"}], "prompt"),
    rows("has a prompt of zero-width characters", [*GOOD, {"prompt": "\u200b\u200d\ufeff"}], "prompt"),
    rows(
        "has prompts of two kinds",
        [*GOOD, chat({"role": "user", "content": "w1"})],
        "prompt",
        ending=Either(OneLine(2, "prompt"), Survived(like=ANY)),
    ),
    rows("has a role with a capital letter", [chat({"role": "User", "content": "w1"})] * 4, "User"),
    rows("has a role of its own", [chat({"role": "wizard", "content": "w1"})] * 4, "wizard"),
    rows("has no content", [chat({"role": "user"})] * 4, "content"),
    rows("has no messages", [{"prompt": []}] * 4, "prompt"),
    rows(
        "ends with the assistant",
        [chat({"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"})] * 4,
        ending=Either(OneLine(2, "assistant"), Survived(like=ANY)),
    ),
    rows("has an image in a message", [chat({"role": "user", "content": [{"type": "image"}]})] * 4, "image"),
    rows(
        "has a lone surrogate",
        [*GOOD, '{"prompt": "w1 \\ud800"}'],
        "data.jsonl",
        ending=Either(OneLine(2, "data.jsonl"), OneLine(2, "prompt"), Survived(like=ANY)),
    ),
    rows("has a NUL", [*GOOD, {"prompt": "w1 \x00 w2"}], ending=Either(OneLine(2, "prompt"), Survived(like=ANY))),
    rows(
        "has a number beyond 64 bits",
        [dict(row, n=2**70) for row in GOOD],
        "n",
        ending=Either(OneLine(2, "n"), Survived(like=ANY)),
    ),
    rows("has a number of 5000 digits", ['{"prompt": "w1", "n": 1' + "0" * 5000 + "}"] * 4, "data.jsonl"),
    rows(
        "has NaN in a column",
        ['{"prompt": "w1 w2", "n": NaN}'] * 4,
        ending=Either(OneLine(2, "data.jsonl"), Survived(like=ANY)),
    ),
    rows(
        "has a column of two types",
        [{"prompt": "w1", "n": 1}, {"prompt": "w2", "n": "x"}] * 4,
        ending=Either(OneLine(2, "n"), Survived(like=ANY)),
    ),
    rows("is nested 20,000 deep", [*GOOD, '{"prompt": "w1", "n": ' + "[" * 20_000 + "]" * 20_000 + "}"], "data.jsonl"),
    rows(
        "replaces the chat template",
        [dict(chat({"role": "user", "content": "w1"}), chat_template_kwargs={"chat_template": "owned"})] * 4,
        ending=Either(OneLine(2, "chat_template"), Survived(like=ANY)),
    ),
    rows("has a prompt longer than all", [*GOOD, {"prompt": "w1 " * 3000}], ending=Survived(like=ANY)),
    file("is no UTF-8", "other.jsonl", b'{"prompt": "\xff\xfe"}\n' * 4, "other.jsonl"),
    file("is JSON that ends early", "other.json", '[{"prompt": "w1"}, {"prom', "other.json"),
    file("is JSON of something else", "other.json", '{"version": 1}', "other.json"),
    file("is JSON nested 20,000 deep", "other.json", "[" * 20_000 + "]" * 20_000, "other.json"),
    file("is a zip that ends early", "other.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "other.jsonl.gz"),
    file("is no zip", "other.jsonl.gz", b"not zipped", "other.jsonl.gz"),
    file("is a parquet file that ends early", "other.parquet", b"PAR1" + b"\0" * 20, "other.parquet"),
    file("has a column twice", "other.csv", CSV.replace("year", "prompt"), "other.csv", "prompt"),
    file("has a row that is too long", "other.csv", CSV + "w1,2,3\n", "other.csv"),
    file(
        "has a row that is too short",
        "other.csv",
        CSV + "w1\n",
        ending=Either(OneLine(2, "other.csv"), Survived(like=ANY)),
    ),
    file("has an open quote", "other.csv", CSV + '"w1,2\n', "other.csv"),
    file("has only a header", "other.csv", "prompt\n", "other.csv"),
    file(
        "has a star in its name",
        "a*b.jsonl",
        "".join(json.dumps(row) + "\n" for row in GOOD),
        ending=Survived(like=ANY),
    ),
    file(
        "has brackets in its name",
        "a[1].jsonl",
        "".join(json.dumps(row) + "\n" for row in GOOD),
        ending=Survived(like=ANY),
    ),
    file("is of an unknown kind", "other.docx", "x", "other.docx"),
    Fault("data", "is not there", OneLine(2, "nowhere.jsonl"), options=dict(dataset_name="nowhere.jsonl")),
    Fault(
        "data",
        "is an empty folder",
        OneLine(2, "empty"),
        options=dict(dataset_name="./empty"),
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    Fault("data", "is a pattern for nothing", OneLine(2, "none*.jsonl"), options=dict(dataset_name="none*.jsonl")),
    Fault("data", "is a device without an end", OneLine(2, "/dev/zero"), options=dict(dataset_name="/dev/zero")),
]

BIG = "policy/model.safetensors"
HEADER = (2**40).to_bytes(8, "little") + b"{}"


def model(name: str, change: Change, *words: str, ending: Ending | None = None) -> Fault:
    return Fault("model folder", name, ending or OneLine(2, *(words or ("policy",))), prepare=change)


def drop(key: str):
    return lambda values: values.pop(key)


MODELS = [
    model("has no weights", removed(BIG)),
    model("has empty weights", emptied(BIG)),
    model("has half of its weights", cut_in_half(BIG)),
    model("has weights that end in zeros", zeroed(BIG), ending=Either(OneLine(2, "policy"), Survived(like=ANY))),
    model("has weights with a header of a terabyte", written(BIG, HEADER)),
    model(
        "has weights of another shape",
        edited_tensors(BIG, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:3].clone()})),
    ),
    model("has a tensor too few", edited_tensors(BIG, drop("model.norm.weight"))),
    model(
        "has a tensor too many",
        edited_tensors(BIG, lambda t: t.update(extra=t["model.norm.weight"].clone())),
        ending=Either(OneLine(2, "policy"), Survived(like=ANY)),
    ),
    model("has no config", removed("policy/config.json")),
    model("has a config that is no JSON", written("policy/config.json", "{")),
    model("has a config of no kind", edited_json("policy/config.json", drop("model_type"))),
    model("has a config of an unknown kind", edited_json("policy/config.json", lambda c: c.update(model_type="x"))),
    model("has a config of another size", edited_json("policy/config.json", lambda c: c.update(hidden_size=32))),
    model("has a config with more layers", edited_json("policy/config.json", lambda c: c.update(num_hidden_layers=3))),
    model("has a config with fewer words", edited_json("policy/config.json", lambda c: c.update(vocab_size=7))),
    model(
        "asks for code of its own",
        edited_json(
            "policy/config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
        ),
        "policy",
    ),
    model(
        "has no tokenizer",
        all_of(removed("policy/tokenizer.json"), removed("policy/tokenizer_config.json")),
        "tokenizer",
    ),
    model("has a tokenizer that is no JSON", written("policy/tokenizer.json", "{")),
    model("has half of a tokenizer", cut_in_half("policy/tokenizer.json")),
    model(
        "has a broken chat template",
        written("policy/chat_template.jinja", "{% for m in %}"),
        "template",
        ending=Either(OneLine(2, "template"), Survived(like=ANY)),
    ),
    model(
        "has a generation config that is no JSON",
        written("policy/generation_config.json", "{"),
        "generation_config.json",
    ),
    model(
        "has absurd defaults of generation",
        edited_json("policy/generation_config.json", lambda c: c.update(temperature=-1.0)),
        ending=Either(OneLine(2, "generation"), Survived(like=ANY)),
    ),
    model("is a file", all_of(removed("policy"), written("policy", "x"))),
    model("is not there", removed("policy")),
    model(
        "has its weights in a pickle",
        all_of(removed(BIG), written("policy/pytorch_model.bin", b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.")),
        "policy",
    ),
    model(
        "has an index that names no file",
        all_of(
            removed(BIG),
            written(
                "policy/model.safetensors.index.json",
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}),
            ),
        ),
    ),
    model(
        "is BERT", edited_json("policy/config.json", lambda c: c.update(model_type="bert", architectures=["BertModel"]))
    ),
    model(
        "is a reward model",
        edited_json("policy/config.json", lambda c: c.update(architectures=["LlamaForSequenceClassification"])),
        "policy",
    ),
    Fault(
        "model folder",
        "of the reference is not there",
        OneLine(2, "nowhere"),
        options=dict(ref_model_name_or_path="./nowhere"),
    ),
    Fault(
        "model folder",
        "of the reference has other words",
        OneLine(2, "reference"),
        options=dict(ref_model_name_or_path="./reference"),
        prepare=lambda folder: another_vocabulary(folder),
    ),
    Fault(
        "model folder",
        "of the reward is not there",
        OneLine(2, "nowhere"),
        options=dict(reward_funcs=None, reward_model_path="./nowhere"),
    ),
    Fault(
        "model folder",
        "of the reward is no reward model",
        OneLine(2, "policy"),
        options=dict(reward_funcs=None, reward_model_path="./policy"),
    ),
]


def another_vocabulary(folder) -> None:
    """The same size, with two words changed over."""
    import shutil

    shutil.copytree(folder / "policy", folder / "reference")
    edited(
        "reference/tokenizer.json",
        lambda data: data.replace(b'"w1"', b'"wX"').replace(b'"w2"', b'"w1"').replace(b'"wX"', b'"w2"'),
    )(folder)


FAULTS = [*RUN_FILES, *DATA, *MODELS]
