"""What people type wrongly, and the one line that each gets: no traceback, exit code 2, and what to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from online_dpo.cli.main import main
from online_dpo.cli.runfile.entries import read_overrides
from online_dpo.cli.runfile.json_schema import run_file_schema
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.cli.runfile.values import _parse_word

GOOD = "model_name_or_path: owner/model\ndataset_name: owner/data\nreward_funcs: rewards.py:brevity\noutput_dir: out\n"
GIVEN = "--model_name_or_path owner/model --dataset_name owner/data --reward_funcs rewards.py:brevity"
FILES = {
    "good.yaml": GOOD,
    "with space/run.yaml": GOOD + "learning_rat: 1\n",
    "tabs.yaml": "model_name_or_path: a\n\tdataset_name: b\n",
    "twice.yaml": GOOD + "beta: 0.1\nbeta: 0.2\n",
    "empty.yaml": "",
    "comment.yaml": "# nothing\n---\n",
    "list.yaml": "- a: 1\n- b: 2\n",
    "text.yaml": "just words",
    "latin.yaml": b"run_name: caf\xe9\n",
    "binary.yaml": b"\x00\x01\x02",
    "nested.yaml": GOOD + "training:\n  learning_rate: 1e-6\n",
    "verl.yaml": GOOD + "actor_rollout_ref:\n  rollout:\n    n: 5\n",
    "documents.yaml": GOOD + "---\na: 1\n",
    "tag.yaml": GOOD + "run_name: !!python/object/apply:os.system ['true']\n",
    "anchor.yaml": GOOD + "beta: *nowhere\n",
    "cycle.yaml": "a: &a [*a]\n",
    "keys.yaml": GOOD + "? [a, b]\n: c\n",
    "unclosed.yaml": GOOD + 'run_name: "abc\n',
    "env.yaml": GOOD.replace("owner/model", "$MODEL_DIR/x"),
    "run.txt": "hello: : there",
    "huge.yaml": GOOD + "max_new_tokens: 1e400\n",
    "nan.yaml": GOOD + "learning_rate: .nan\n",
    "date.yaml": GOOD + "max_steps: 2024-01-31\n",
    "none.yaml": GOOD + "learning_rate: None\n",
    "half.yaml": GOOD + "num_completions: 2.5\n",
    "alias.yaml": GOOD + "log_unique_prompts: true\n",
    "minutes.yaml": GOOD + "ddp_timeout: 1:30\n",
    "laughs.yml": GOOD
    + "a: &a [x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)).replace("*a0", "*a"),
    "deep.yml": GOOD + "generation_kwargs: " + "[" * 20_000 + "\n",
    "many.yml": GOOD + "".join(f"k{i}: 1\n" for i in range(2000)),
    "large.yml": GOOD + "#" * 2_000_000,
    "esc.yaml": GOOD + 'run_name: "\\e[31m"\n',
    "types.yaml": GOOD + "dataset_types: {year: 64}\n",
    "template.yaml": GOOD + 'prompt_template: "{x.__class__}"\n',
    "space.yaml": GOOD.replace("owner/data", '"prompts.jsonl "'),
    "root.yaml": GOOD.replace("out\n", "/\n"),
    "own.yaml": GOOD.replace("owner/model", "model").replace("out\n", "model\n"),
    "split.yaml": GOOD + 'dataset_train_split: ""\n',
    "tagged.yml": GOOD + "max_steps: !!int x\n",
    "model/config.json": "{}",
    "deep.jsonl": '{"prompt": ' + "[" * 20_000 + "\n",
    "double.jsonl": '{"prompt": "a", "prompt": "b", "chosen": "b", "rejected": "c"}\n',
    "blank.jsonl": '{"prompt": "\\u200b", "chosen": "b", "rejected": "c"}\n',
    "judge.yaml": GOOD + "judge: llm\njudge_kwargs: {modle: x}\n",
    "rewards.py": "def brevity(completions, **_):\n    return [0.0 for c in completions]\n",
    "broken.py": "def f(:\n",
    "data.txt": "text",
    "prompts.jsonl": '{"prompt": "a"}\n',
    "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "latin.jsonl": b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}\n',
    "no.jsonl": "{a\n",
    "empty.jsonl": "",
    "folder/empty/.keep": "",
    "run/checkpoint-5/trainer_state.json": "{}",
    "file": "x",
}
COMPARE = "--model a/b --against a/c --prompts prompts.jsonl --reward a/r"
AT = "--model m --base-url http://localhost:1"
LINES = {
    # run files
    "train tabs.yaml": "tabs.yaml:2: no valid YAML: found character '\\t' that cannot start any token. Indent with bla",
    "train twice.yaml": "twice.yaml:6: `beta` stands twice. Leave one out.",
    "train empty.yaml": "empty.yaml: the file is empty. It needs at least `model_name_or_path`",
    "train comment.yaml": "comment.yaml: the file is empty. It needs at least `model_name_or_path`",
    "train list.yaml": "list.yaml: wanted: a mapping of fields, one `name: value` a line.",
    "train text.yaml": "text.yaml: wanted: a mapping of fields, one `name: value` a line.",
    "train latin.yaml": "latin.yaml: the text is not in UTF-8. Save it as UTF-8.",
    "train binary.yaml": "binary.yaml: no valid YAML: unacceptable character #x0000",
    "train nested.yaml": "nested.yaml:5: `training` is not a field. Fields are not nested: write `learning_rate: ...`",
    "train verl.yaml": "verl.yaml:5: `actor_rollout_ref` is not a field. Fields are not nested: write `num_completions",
    "train documents.yaml": "documents.yaml:5: no valid YAML: but found another document.",
    "train tag.yaml": "tag.yaml:5: no valid YAML: could not determine a constructor",
    "train anchor.yaml": "anchor.yaml:5: no valid YAML: found undefined alias 'nowhere'.",
    "train cycle.yaml": "cycle.yaml:1: no valid YAML: an alias refers to what it stands in.",
    "train keys.yaml": "keys.yaml: a list or a mapping stands where the name of a field is wanted.",
    "train unclosed.yaml": "unclosed.yaml:6: no valid YAML: found unexpected end of stream.",
    "train env.yaml": "env.yaml:1: `model_name_or_path` is '$MODEL_DIR/x': environment variables are not filled in her",
    "train run.txt": "run.txt:1: no valid YAML: mapping values are not allowed here.",
    "train huge.yaml": "huge.yaml:5: `max_new_tokens` is '1e400'; wanted: a whole number.",
    "train nan.yaml": "nan.yaml:5: `learning_rate` is nan; wanted: a number.",
    "train date.yaml": "date.yaml:5: `max_steps` is '2024-01-31'; wanted: a whole number.",
    "train none.yaml": "none.yaml:5: `learning_rate` is 'None'; wanted: a number.",
    "train half.yaml": "half.yaml:5: `num_completions` is 2.5; wanted: a whole number.",
    "train alias.yaml": "alias.yaml:5: `log_unique_prompts` is not a field. With `run_folder` all answers are",
    "train minutes.yaml": "minutes.yaml:5: `ddp_timeout` is '1:30'; wanted: a whole number.",
    "train laughs.yml": "laughs.yml:9: no valid YAML: more than 20000 values, counted as often as aliases repeat",
    "train deep.yml": "deep.yml:5: no valid YAML: nested more than 50 levels deep.",
    "train many.yml": "many.yml: there are 2004 fields. A run file has at most 1000.",
    "train large.yml": "large.yml: the file has 2000106 bytes. A run file has at most 1048576.",
    "train esc.yaml": "esc.yaml:5: `run_name` is '\\x1b[31m'; it holds '\\x1b', which is no character of a text.",
    "train types.yaml": "types.yaml:5: `dataset_types` has 64 for `year`; wanted: the name of a type, such as int64.",
    "train template.yaml": "template.yaml:5: `prompt_template` '{x.__class__}': '{x.__class__}' reads an attribute.",
    "train space.yaml": "space.yaml:2: `dataset_name` is 'prompts.jsonl ': there is white space at an end",
    "train root.yaml": "root.yaml:4: `output_dir` is the root of the file system.",
    "train own.yaml": "own.yaml:4: `output_dir` is the folder of `model_name_or_path`, whose files the run would",
    "train split.yaml": "split.yaml:5: `dataset_train_split` is ''. Give it without blanks around it, and not empty.",
    "train tagged.yml": "tagged.yml:5: no valid YAML: 'x' is no int.",
    "train /dev/zero": "/dev/zero: this is a pipe or a device. Copy its content to a file.",
    "train ~nobody-at-all/run.yaml": "~nobody-at-all/run.yaml: there is no such file.",
    "train folder": "folder: this is a folder. Give the run file in it.",
    "train nowhere.yaml": "nowhere.yaml: there is no such file.",
    "train ~/no-such-run.yaml": f"{Path('~/no-such-run.yaml').expanduser()}: there is no such file.",
    "train 'with space/run.yaml'": "with space/run.yaml:5: `learning_rat` is not a field. Did you mean `learning_rate`",
    "train good.yaml other.yaml": "command line: what is `other.yaml`? Fields are given as --field value.",
    "train good.yaml --config other.yaml": "command line: there are two run files, good.yaml and other.yaml.",
    "train --config": "command line: `--config` needs the name of a run file: --config run.yaml",
    "train --config= --beta 1": "command line: `--config` needs the name of a run file: --config run.yaml",
    "train --config nowhere.yaml": "nowhere.yaml: there is no such file.",
    # values on the command line
    f"train {GIVEN} --beta=": "command line: `beta` is ''; wanted: a list of numbers.",
    f"train {GIVEN} --beta 0.1 0.2 x": "command line: `beta` is [0.1, 0.2, 'x']; wanted: a list of numbers.",
    f"train {GIVEN} --beta": "command line: `beta` needs a value: a list of numbers.",
    f"train {GIVEN} --no-bf16": "command line: `no_bf16` is not a field. Write `bf16: false`, or --bf16 false.",
    f"train {GIVEN} --max_steps 1 --max_steps": "command line: `max_steps` needs a value: a whole number.",
    f"train {GIVEN} -beta 5": "command line: what is `-beta`? Fields have two hyphens: --field value.",
    f"train {GIVEN} --use_cpu maybe": "command line: `use_cpu` is 'maybe'; wanted: true or false.",
    f"train {GIVEN} --actor.optim.lr 5": "command line: `actor.optim.lr` is not a field. Here it is `learning_rate`.",
    f"train {GIVEN} --model_init_kwargs dtype=bfloat16": "command line: `model_init_kwargs` must be a dict, or a JSON",
    f"train {GIVEN} --generation_kwargs '{{a'": "command line: `generation_kwargs` must be a dict, or a JSON object as",
    f"train {GIVEN} --lr_scheduler_kwargs x": "command line: `lr_scheduler_kwargs` must be a dict, or a JSON object",
    f"train {GIVEN} --learning_rate -1": "command line: `learning_rate` must be above 0, and finite; it is -1.",
    f"train {GIVEN} --learning_rate 1e999": "command line: `learning_rate` must be above 0, and finite; it is inf.",
    f"train {GIVEN} --gradient_accumulation_steps 0": "command line: `gradient_accumulation_steps` must be at least 1",
    f"train {GIVEN} --per_device_train_batch_size 0": "command line: `per_device_train_batch_size` must be at least 1",
    f"train {GIVEN} --max_steps 0": "command line: `max_steps` must be 1 or more, or -1 to go by epochs; it is 0.",
    f"train {GIVEN} --adam_beta1 5": "command line: `adam_beta1` must be 0 or more, and below 1; it is 5.",
    f"train {GIVEN} --seed -1": "command line: `seed` must be from 0 to 2**32 - 1; it is -1.",
    f"train {GIVEN} --dtype int8": "command line: `dtype` is 'int8'; wanted: one of auto, float32, bfloat16, float16",
    f"train {GIVEN} --dtype bfloat16 --model_init_kwargs '{{dtype: float32}}'": "command line: `dtype` is given beside "
    "`dtype` in `model_init_kwargs`. Give one of them.",
    f"train {GIVEN} --max_steps 1:30": "command line: `max_steps` is '1:30'; wanted: a whole number.",
    f"train {GIVEN} --max_steps '5 # x'": "command line: `max_steps` is '5 # x'; wanted: a whole number.",
    f"train {GIVEN} —max_steps 5": "command line: `—max_steps` begins with a long dash. Fields have two hyphens: --fi",
    f"train {GIVEN} --generation_kwargs '&a {{x: *a}}'": "command line: `generation_kwargs` must be a dict, or a JSON",
    f"train {GIVEN} --generation_kwargs {'[' * 3000}": "command line: `generation_kwargs` must be a dict, or a JSON",
    # paths and code
    f"train {GIVEN} --resume_from_checkpoint nowhere": "command line: `resume_from_checkpoint`: there is no folder now",
    f"train {GIVEN} --resume_from_checkpoint run": "command line: `resume_from_checkpoint`: run is no checkpoint of a "
    "run (no trainer_state.json). It holds checkpoint-5: give one of them.",
    f"train {GIVEN} --output_dir file": "command line: `output_dir` is a file. Give the name of a folder, new or old.",
    f"train {GIVEN} --output_dir ''": "command line: `output_dir` is empty. Give the name of a folder, new or old.",
    f"train {GIVEN} --model_name_or_path ./no": "command line: `model_name_or_path` is './no', but there is no no. Giv",
    f"train {GIVEN} --model_name_or_path folder": "command line: `model_name_or_path`: folder is no model folder: it h",
    f"train {GIVEN} --reward_funcs broken.py:f": "command line: `reward_funcs` 'broken.py:f': `broken.py` is no valid ",
    f"train {GIVEN} --reward_funcs rewards.py:no": "command line: `reward_funcs` 'rewards.py:no': `rewards.py` defines "
    "no `no`; it defines: brevity.",
    f"train {GIVEN} --reward_funcs rewards.py": "command line: `reward_funcs` 'rewards.py': wanted: `file.py:function`",
    f"train {GIVEN} --reward_funcs no.module:f": "command line: `reward_funcs` 'no.module:f': there is no module `no`.",
    f"train {GIVEN} --reward_funcs accuracy_reward": "command line: `reward_funcs` 'accuracy_reward': wanted: "
    "`file.py:function` or `package.module:function`, such as `trl.rewards:accuracy_reward`.",
    f"train {GIVEN} --reward_funcs owner/reward": "command line: `reward_funcs` 'owner/reward': wanted: "
    "`file.py:function` or `package.module:function`; a reward model goes into `reward_model_path`.",
    f"train {GIVEN} --judge gpt-4": "command line: `judge` is 'gpt-4', but there is no folder gpt-4. Give `llm`",
    f"train {GIVEN} --help nosuch": "command line: there is no field or group `nosuch`. Groups: models",
    # other commands
    "tran good.yaml": "there is no command `tran`. Did you mean `train`? See: online-dpo --help",
    "good.yaml": "a run file comes after a command: online-dpo train good.yaml",
    "--verison": "there is no option `--verison`; a command comes first: train, ray, eval, doctor, judge, serve, ",
    "export nowhere --to a.jsonl": "nowhere: there is no such folder.",
    "export . --to a.jsonl": ".: no run has written its record here: there is no metrics.jsonl or events.jsonl.",
    "export . --to a.csv --step 3": "unrecognized arguments: --step 3. Here it is `steps`.",
    "export .": "the following arguments are required: --to.",
    "report nowhere": "nowhere: there is no such folder.",
    "report": "the following arguments are required: FOLDER.",
    "report . --to page.html": "unrecognized arguments: --to page.html. Here it is `output`.",
    "schema run.yaml": "unrecognized arguments: run.yaml. See: online-dpo schema --help",
    "quickstart --seed x": "argument --seed: invalid int value: 'x'. See: online-dpo quickstart --help",
    "quickstart --outputdir a": "unrecognized arguments: --outputdir a. Did you mean `output-dir`? See: online-dpo qui",
    "quickstart --output_dir file": "--output-dir file is a file. Give the name of a folder.",
    "eval nowhere.yaml": "nowhere.yaml: there is no such file.",
    "eval --config list.yaml": "list.yaml: wanted: a mapping of fields, one `name: value` a line.",
    "eval --model folder --against owner/x --prompts prompts.jsonl --reward owner/r": "command line: `model`: folder "
    "is no model folder: it holds no config.json or adapter_config.json.",
    "eval --model a/b --against a/c --prompts prompts.jsonl --reward_model a/r --reward a/r": "command line: "
    "`reward_model` is not a field. Here it is `reward`.",
    "judge pairs.jsonl": "Give --model, the judging model's name at the endpoint, or --pairwise-model.",
    f"judge nowhere.jsonl {AT}": "nowhere.jsonl: there is no such file.",
    f"judge folder {AT}": "folder: this is a folder. Give a file in it.",
    f"judge latin.jsonl {AT}": "latin.jsonl:1: the text is not in UTF-8. Save the file as UTF-8.",
    f"judge no.jsonl {AT}": "no.jsonl:1: the line is no JSON",
    f"judge deep.jsonl {AT}": "deep.jsonl:1: it is nested more than 100 levels deep",
    f"judge double.jsonl {AT}": "double.jsonl:1: the key 'prompt' stands twice in one object",
    f"judge blank.jsonl {AT}": "blank.jsonl:1: `prompt` is empty.",
    f"judge /dev/zero {AT}": "/dev/zero: this is a pipe or a device.",
    f"judge pairs.jsonl {AT} --output ./pairs.jsonl": "--output: pairs.jsonl is the file of the pairs. Give another on",
    f"judge pairs.jsonl {AT} --extra '&a {{x: *a}}'": "--extra is '&a {x: *a}'; wanted: such as '{seed: 0}'.",
    f"eval {COMPARE} --output prompts.jsonl": "command line: `output` is the file of the prompts. Give another one.",
    f"eval {COMPARE} --output x --json ./x": "command line: `output` is the file of `json`. Give another one.",
    f"eval {COMPARE} --model 'a/b '": "command line: `model` is 'a/b ': there is white space at an end",
    f"judge empty.jsonl {AT}": "empty.jsonl: there are no pairs in it.",
    "judge pairs.jsonl --judge-model m": "unrecognized arguments: --judge-model m. Here it is `model`.",
    "judge pairs.jsonl --config judge.yaml": "judge.yaml:6: `judge: llm`: `modle` is not one of `judge_kwargs`. Did yo",
    "judge pairs.jsonl --config good.yaml": "good.yaml: wanted: `judge: llm`, or `judge` with the folder of a pairwise",
    "serve": "the following arguments are required: MODEL. See: online-dpo serve --help",
    "serve m --port x": "argument --port: invalid int value: 'x'. See: online-dpo serve --help",
    "serve m --enforce-eager": "unrecognized arguments: --enforce-eager. Options of `vllm serve` go after `--`",
    "serve m --max_lora_rank 8": "unrecognized arguments: --max-lora-rank 8. Here it is `lora-rank`.",
}


NOT_IN_THE_SCHEMA = {
    "good.yaml": "nothing is wrong",
    "twice.yaml": "YAML's own parser, in an editor, refuses a key that stands twice",
    "env.yaml": "any text is the name of a model",
    "nan.yaml": "NaN is a number",
    "template.yaml": "any text is a template",
    "space.yaml": "any text is the name of a dataset",
    "root.yaml": "any text is a folder",
    "own.yaml": "any text is a folder",
    "split.yaml": "any text is a split",
    "esc.yaml": "any character is one of a text",
    "minutes.yaml": "YAML 1.1, in which this is 90",
    "types.yaml": "any mapping is one of types",
}
"""What the schema of run files lets through, and why."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(("line", "message"), LINES.items(), ids=list(LINES))
def test_a_bad_line_gets_one_line_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    try:
        code = main(shlex.split(line))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    [only] = said.err.splitlines()
    assert only.startswith(f"error: {message}")


def test_a_run_file_stands_in_front_or_behind_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from online_dpo.cli.runfile.planning import split_words
    from online_dpo.cli.runfile.run_file import plan_run

    monkeypatch.chdir(folder)
    plans = [
        plan_run(*split_words(shlex.split(words)))
        for words in ("good.yaml --lr 1", "--config good.yaml --lr 1", "--lr 1 --config=good.yaml")
        for words in [words.replace("--lr", "--learning_rate")]
    ]
    assert plans[0].training == {"output_dir": "out", "learning_rate": 1}
    assert plans[1:] == plans[:1] * 2


def test_a_judge_s_settings_come_from_a_run_file_and_options_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from online_dpo.cli.judge import _parser, chosen_judge

    monkeypatch.chdir(folder)
    settings = {"model": "m", "base_url": "http://localhost:1", "votes": 3}
    (folder / "with_judge.yaml").write_text(f"{GOOD}judge: llm\njudge_kwargs: {json.dumps(settings)}\n")
    words = ["pairs.jsonl", "--config", "with_judge.yaml", "--votes", "5"]
    assert chosen_judge(vars(_parser().parse_args(words))).options == {**settings, "votes": 5}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_an_editor_refuses_it_as_well(name: str) -> None:
    """By the schema of run files, or because it is no YAML."""
    try:
        fields = yaml.safe_load(FILES[name])
    except (yaml.YAMLError, UnicodeDecodeError):
        assert name not in NOT_IN_THE_SCHEMA
        return
    assert Draft202012Validator(run_file_schema(load_fields())).is_valid(fields) == (name in NOT_IN_THE_SCHEMA)


def wrong_fields() -> Iterator[tuple[str, Any]]:
    """The fields of the command lines above that are wrong by type, choice, range or name, as a run file holds them."""
    for line, message in LINES.items():
        by_itself = "; wanted: one of" in message or "; wanted: a list" in message or "; wanted: true" in message
        if line.startswith(f"train {GIVEN}") and (by_itself or "must be" in message or "is not a field" in message):
            for name, entry in read_overrides(shlex.split(line.removeprefix(f"train {GIVEN}")), []).items():
                words = [_parse_word(word) for word in entry.words or ()]
                yield name, words if len(words) > 1 else next(iter(words), None)


def test_an_editor_refuses_wrong_values_of_single_fields() -> None:
    validator = Draft202012Validator(run_file_schema(load_fields()))
    accepted = [field for field in wrong_fields() if validator.is_valid({**yaml.safe_load(GOOD), **dict([field])})]
    assert len([*wrong_fields()]) >= 16
    # text is seen for its form alone: JSON by its first bracket, a number by its letters
    assert accepted == [("generation_kwargs", "{a"), ("learning_rate", "1e999")]
