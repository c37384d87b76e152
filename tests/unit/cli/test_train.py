"""The command line: what it accepts, what it says about what it does not, and how fast it says it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

import online_dpo
from online_dpo.cli.main import main
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.help import GROUPS, USUAL
from online_dpo.cli.runfile.references import load_reference, parse_reference
from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.run_file import looks_like_path, plan_run
from online_dpo.cli.runfile.schema import PARENT, WIDER_TYPES, FieldSpec, load_fields
from online_dpo.cli.runfile.values import BadValue, convert, convert_words
from online_dpo.cli.terminal.progress import plain_warnings
from online_dpo.config.feedback import OVEROPTIMISATION_POLICIES, PAIR_SELECTIONS, TIE_POLICIES
from online_dpo.config.loss import LOSS_TYPES
from online_dpo.config.trainer_config import INVALID_PROMPT_POLICIES, OnlineDPOConfig

FIELDS = load_fields()
GOOD = {
    "model_name_or_path": "owner/model",
    "dataset_name": "owner/data",
    "reward_funcs": "rewards.py:brevity",
    "output_dir": "out",
}
SLACK = 2  # this machine may be busy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a reward function in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def brevity(completions, **_):\n    return [-len(c) for c in completions]\n")
    return tmp_path


def write(path: Path, fields: dict | str) -> Path:
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields, sort_keys=False))
    return path


def problems_of(path: Path | None, *words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        plan_run(path, words)
    return list(caught.value.problems)


def command(*words: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    source = str(Path(online_dpo.__file__).parent.parent)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "online_dpo", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - started


# --- the fields are those of the classes -----------------------------------------------------------------------------


def test_fields_are_those_of_the_classes() -> None:
    classes = {field.name for cls in (RunConfig, OnlineDPOConfig) for field in dataclasses.fields(cls) if field.init}
    assert set(FIELDS) == classes


def test_plain_defaults_are_those_of_the_classes() -> None:
    compared = 0
    for field in dataclasses.fields(OnlineDPOConfig):
        text = FIELDS[field.name].default
        if text is not None and field.default is not dataclasses.MISSING:
            value = eval(text, {})  # source text of a literal
            assert value == field.default, field.name
            compared += 1
    assert compared > 120


def test_every_field_of_ours_is_documented_and_has_a_type_that_is_understood() -> None:
    ours = [spec for spec in FIELDS.values() if spec.group != "transformers.TrainingArguments"]
    assert [spec.name for spec in ours if not spec.doc] == []
    assert FIELDS["beta"].doc.startswith("Strength of the pull towards the reference")
    assert FIELDS["seed"].doc == "Random seed that will be set at the beginning of training."
    known = {"int", "float", "bool", "str", "None", "list", "dict", "Literal"}
    unknown = {
        spec.name
        for spec in FIELDS.values()
        if not known & {part.split("[")[0].strip() for part in spec.annotation.split("|")} - {"None"}
    }
    assert unknown == {"parallelism_config"}


def test_choices_come_from_the_classes() -> None:
    assert FIELDS["loss_type"].choices == LOSS_TYPES
    assert FIELDS["pair_selection"].choices == PAIR_SELECTIONS
    assert FIELDS["tie_policy"].choices == TIE_POLICIES
    assert FIELDS["overoptimisation"].choices == OVEROPTIMISATION_POLICIES
    assert FIELDS["invalid_prompts"].choices == INVALID_PROMPT_POLICIES
    assert FIELDS["eval_strategy"].choices == tuple(item.value for item in IntervalStrategy)
    assert FIELDS["lr_scheduler_type"].choices == tuple(item.value for item in SchedulerType)
    assert FIELDS["train_sampling_strategy"].choices == ("random", "sequential", "group_by_length", "batch_rebalance")
    assert FIELDS["output_dir"].choices == ()


def test_widened_fields_exist() -> None:
    assert set(WIDER_TYPES) <= {field.name for field in dataclasses.fields(TrainingArguments)}


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("learning_rate", "1e-4", 1e-4),  # YAML reads 1e-4 as text
        ("learning_rate", 1, 1),
        ("max_steps", "1e2", 100),
        ("max_steps", 100.0, 100),
        ("beta", 0.1, [0.1]),
        ("beta", ["1e-1", 1], [0.1, 1]),
        ("use_cpu", "yes", True),
        ("use_cpu", "Off", False),
        ("eval_strategy", False, "no"),  # YAML reads no as false
        ("overoptimisation", False, "off"),  # and off
        ("report_to", ["a", "b"], ["a", "b"]),
        ("report_to", "none", "none"),
        ("max_length", None, None),
        ("resume_from_checkpoint", True, True),
        ("generation_kwargs", {"a": 1}, {"a": 1}),
        ("trackio_static_space_id", False, False),
        ("reward_funcs", "a.py:f", ["a.py:f"]),
    ],
)
def test_values_that_are_taken(name: str, given: object, meant: object) -> None:
    converted = convert(FIELDS[name], given)
    assert converted == meant
    assert type(converted) is type(meant)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("learning_rate", "fast", "is 'fast'; wanted: a number."),
        ("learning_rate", float("nan"), "is nan; wanted: a number."),
        ("learning_rate", True, "is true; wanted: a number."),
        ("max_steps", 1.5, "is 1.5; wanted: a whole number."),
        ("max_steps", None, "is empty; wanted: a whole number."),
        ("max_length", "long", "is 'long'; wanted: a whole number or null."),
        ("use_cpu", 1, "is 1; wanted: true or false."),
        ("run_name", 2024, "is 2024; wanted: text or null. Write it in quotes."),
        ("beta", [0.1, "x"], "is [0.1, 'x']; wanted: a list of numbers."),
        ("tie_policy", "frist", "is 'frist'; wanted: one of skip, first. Did you mean `first`?"),
        (
            "loss_type",
            ["sigmoid", "stf"],
            f"is ['sigmoid', 'stf']; wanted: one of {', '.join(LOSS_TYPES)} or a list of these. Did you mean `sft`?",
        ),
        ("generation_kwargs", [1], "is [1]; wanted: a mapping or text or null."),
        ("parallelism_config", {}, "is {}; wanted: null."),
    ],
)
def test_values_that_are_refused(name: str, given: object, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        convert(FIELDS[name], given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "words", "meant"),
    [
        ("learning_rate", ["1e-4"], 1e-4),
        ("use_cpu", [], True),
        ("use_cpu", ["false"], False),
        ("run_name", ["12"], "12"),
        ("run_name", ["#1"], "#1"),
        ("run_name", ["a: b"], "a: b"),
        ("run_name", ["null"], None),
        ("beta", ["0.1", "0.2"], [0.1, 0.2]),
        ("loss_type", ["sigmoid", "sft"], ["sigmoid", "sft"]),
        ("loss_type", ["[sigmoid, sft]"], ["sigmoid", "sft"]),
        ("loss_type", ["ipo"], "ipo"),
        ("beta", ["[0.1, 0.2]"], [0.1, 0.2]),
        ("generation_kwargs", ['{"min_new_tokens": 3}'], {"min_new_tokens": 3}),
        ("save_strategy", ["no"], "no"),
        ("max_grad_norm", ["-1"], -1),
    ],
)
def test_words_of_the_command_line(name: str, words: list[str], meant: object) -> None:
    assert convert_words(FIELDS[name], words) == meant


def test_words_that_are_refused() -> None:
    with pytest.raises(BadValue, match=r"^needs a value: a whole number\.$"):
        convert_words(FIELDS["max_steps"], [])
    with pytest.raises(BadValue, match=r"^takes one value, not 2: 1 2\.$"):
        convert_words(FIELDS["max_steps"], ["1", "2"])
    with pytest.raises(BadValue, match=r"^is 'x'; wanted: a whole number\.$"):
        convert_words(FIELDS["max_steps"], ["x"])


def test_literal_values() -> None:
    spec = FieldSpec("x", "Literal['a', 2]", None, "", group="")
    assert convert(spec, 2) == 2
    with pytest.raises(BadValue, match=r"wanted: \('a', 2\)"):
        convert(spec, "b")


# --- run files ------------------------------------------------------------------------------------------------------


def test_plan_of_a_good_run(folder: Path) -> None:
    run_file = write(folder / "run.yaml", {**GOOD, "learning_rate": "1e-4", "max_steps": 3})
    plan = plan_run(run_file, ["--max-steps", "5", "--lora_r=4", "--beta", "0.1", "0.2", "--use_cpu"])
    assert plan.run == RunConfig(
        model_name_or_path="owner/model", dataset_name="owner/data", reward_funcs=["rewards.py:brevity"], lora_r=4
    )
    assert plan.training == {
        "output_dir": "out",
        "learning_rate": 1e-4,
        "max_steps": 5,
        "beta": [0.1, 0.2],
        "use_cpu": True,
    }
    assert load_reference(plan.reward_funcs[0])(["four", ""]) == [-4, 0]
    assert plan.warnings == ("command line: `lora_r` is ignored without `use_peft`.",)


def test_all_problems_at_once(folder: Path) -> None:
    text = """\
model_name_or_path: ./nowhere
learning_rat: 1e-4
max_steps: ten
max_steps: 10
reward_funcs: [rewards.py:brevit, none.py:f, "rewards.py", no_such_package.x:f]
eval_strategy: steps
dataset_limit: 0
dataset_streaming: true
resume_from_checkpoint: true
generation_kwargs: {a: 1, a: 2}
on: 1
"""
    run_file = write(folder / "run.yaml", text)
    assert problems_of(Path("run.yaml"), "--tempratur", "1", "--top_p", "x") == [
        "run.yaml:4: `max_steps` stands twice. Leave one out.",
        "run.yaml:10: `a` stands twice. Leave one out.",
        "run.yaml:2: `learning_rat` is not a field. Did you mean `learning_rate`?",
        "run.yaml:11: `on` is not a field. See: online-dpo train --help",
        "command line: `tempratur` is not a field. Did you mean `temperature`?",
        "command line: `top_p` is 'x'; wanted: a number.",
        "run.yaml: `dataset_name` is missing: the prompts.",
        "run.yaml:1: `model_name_or_path` is './nowhere', but there is no nowhere. Give a folder, or a name on "
        "the hub.",
        "run.yaml:5: `reward_funcs` 'rewards.py:brevit': `rewards.py` defines no `brevit`; it defines: brevity.",
        "run.yaml:5: `reward_funcs` 'none.py:f': there is no file none.py.",
        "run.yaml:5: `reward_funcs` 'rewards.py': wanted: `file.py:function` or `package.module:function`, such as "
        "`rewards.py:reward`.",
        "run.yaml:5: `reward_funcs` 'no_such_package.x:f': there is no module `no_such_package`.",
        "run.yaml:7: `dataset_limit` is 0; wanted: 1 or more.",
        "run.yaml:9: `resume_from_checkpoint`: trainer_output holds no checkpoint.",
        "run.yaml:6: `eval_strategy` needs prompts to evaluate on. Give `dataset_test_split` or `eval_dataset_name`.",
    ]
    write(run_file, text.replace("max_steps: ten\nmax_steps: 10\n", ""))
    assert "run.yaml:6: `dataset_streaming` needs `max_steps`: a stream has no known length." in problems_of(
        Path("run.yaml")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: the file is empty. It needs at least `model_name_or_path` and `dataset_name`."),
        ("# nothing\n", "run.yaml: the file is empty. It needs at least `model_name_or_path` and `dataset_name`."),
        ("- 1\n", "run.yaml: wanted: a mapping of fields, one `name: value` a line."),
        ("a: b\nc: [\n", "run.yaml:3: no valid YAML: expected the node content, but found '<stream end>'."),
    ],
)
def test_files_that_are_no_run_files(folder: Path, text: str, message: str) -> None:
    write(folder / "run.yaml", text)
    assert problems_of(Path("run.yaml")) == [message]


def test_a_run_without_a_scorer(folder: Path) -> None:
    message = "nothing scores the completions. Give one of `reward_funcs`, `reward_model_path`, `judge`."
    fields = {name: value for name, value in GOOD.items() if name != "reward_funcs"}
    assert problems_of(write(folder / "run.yaml", fields)) == [f"{folder}/run.yaml: {message}"]
    assert problems_of(write(folder / "run.yaml", {**fields, "reward_funcs": []})) == [f"{folder}/run.yaml: {message}"]
    assert plan_run(write(folder / "run.yaml", {**fields, "reward_model_path": "a/b"}), []).training[
        "reward_model_path"
    ] == ("a/b")


def test_local_inputs_beside_the_run_file_come_first(folder: Path) -> None:
    recipes = folder / "recipes"
    recipes.mkdir()
    for place in (folder, recipes):
        (place / "data.jsonl").touch()
        (place / "rewards.py").write_text(f"def brevity(**_):\n    return {str(place)!r}\n")
    run_file = write(recipes / "run.yaml", {**GOOD, "dataset_name": "data.jsonl"})
    plan = plan_run(run_file, [])
    assert plan.run.dataset_name == str(recipes / "data.jsonl")
    assert load_reference(plan.reward_funcs[0])() == str(recipes)
    plan = plan_run(run_file, ["--dataset_name", "data.jsonl", "--reward_funcs", "rewards.py:brevity"])
    assert plan.run.dataset_name == "data.jsonl"
    assert plan_run(run_file, ["--dataset_name", "recipes/*.jsonl"]).run.dataset_name == "recipes/*.jsonl"
    assert problems_of(run_file, "--dataset_name", "recipes/*.csv") == [
        "command line: `dataset_name` is 'recipes/*.csv', but there is no recipes/*.csv. Give a file or folder, or "
        "a name on the hub."
    ]
    assert load_reference(plan.reward_funcs[0])() == str(folder)


def test_names_of_the_hub_are_no_paths() -> None:
    assert [name for name in ("gpt2", "owner/model", "owner/data.v2") if looks_like_path(name)] == []
    paths = ("./a", "../a", "/a", "~/a", "a/b/c", "a/", "a.jsonl", "a.jsonl.gz", "b/a.parquet", "b/*.csv")
    assert all(map(looks_like_path, paths))


def test_resuming(folder: Path) -> None:
    fields = {**GOOD, "resume_from_checkpoint": True}
    run_file = write(folder / "run.yaml", fields)
    assert problems_of(run_file) == [f"{run_file}:5: `resume_from_checkpoint`: out holds no checkpoint."]
    assert problems_of(run_file, "--resume_from_checkpoint", "out/checkpoint-3") == [
        "command line: `resume_from_checkpoint`: there is no folder out/checkpoint-3."
    ]
    (folder / "out" / "checkpoint-3").mkdir(parents=True)
    assert problems_of(run_file, "--resume_from_checkpoint", "out") == [
        "command line: `resume_from_checkpoint`: out is no checkpoint of a run (no trainer_state.json). It holds "
        "checkpoint-3: give one of them."
    ]
    (folder / "out" / "checkpoint-3" / "trainer_state.json").touch()
    assert plan_run(run_file, []).training["resume_from_checkpoint"] is True
    given = plan_run(run_file, ["--resume_from_checkpoint", "out/checkpoint-3"]).training["resume_from_checkpoint"]
    assert given == "out/checkpoint-3"


def test_references_to_modules_are_not_imported_when_checked(folder: Path) -> None:
    package = folder / "a_rewards_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "inner.py").write_text("try:\n    import json as Dumper\nexcept ImportError:\n    score, other = 1, 2\n")
    assert parse_reference("a_rewards_package.inner:score", []).module == "a_rewards_package.inner"
    reference = parse_reference("a_rewards_package.inner:Dumper", [])
    with pytest.raises(ValueError, match=r"^`a_rewards_package.inner` defines no `nothing`; it defines: "):
        parse_reference("a_rewards_package.inner:nothing", [])
    with pytest.raises(ValueError, match=r"`a_rewards_package.inner:Dumper` failed: RuntimeError: imported"):
        load_reference(reference)
    assert load_reference(parse_reference("string:capwords", []))("a b") == "A B"


# --- the command ----------------------------------------------------------------------------------------------------


def test_help_answers_within_a_second() -> None:
    done, seconds = command("--help")
    assert done.returncode == 0
    assert "quickstart" in done.stdout and "train" in done.stdout
    assert seconds < 1 * SLACK


def test_help_of_train_shows_every_field() -> None:
    done, seconds = command("train", "--help-all")
    assert done.returncode == 0
    shown = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert shown >= {f"--{name}" for name in FIELDS}
    assert "  --beta  (list[float]; default [0.1])\n      Strength of the pull" in done.stdout
    assert seconds < 1 * SLACK


def test_help_of_train_is_a_screen_or_two_with_all_fields_of_ours_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70 and max(map(len, text.splitlines())) <= 120
    groups = {line.partition(":")[0]: names.split() for line, names in _headed(text)}
    ours = {spec.name for spec in FIELDS.values() if spec.group != PARENT}
    assert ours == {name for group in GROUPS for name in groups[group]}
    assert {"beta", "loss_type"} <= set(groups["loss"]) and "lora_r" in groups["adapters"]
    parent = sum(spec.group == PARENT for spec in FIELDS.values())
    assert f"of transformers.TrainingArguments (and {parent - len(USUAL)} more, see --help-all)" in text
    assert set(USUAL) <= set(FIELDS) - ours


def _headed(text: str) -> list[tuple[str, str]]:
    blocks = re.split(r"\n(?=\S)", text)
    return [(block.partition("\n")[0], block.partition("\n")[2]) for block in blocks]


@pytest.mark.parametrize(
    ("topic", "begins", "holds"),
    [
        ("beta", "  --beta  (list[float]; default [0.1])", ""),
        ("pairs", "  --pair_selection  (str; default 'best_worst')", "--tie_policy"),
        ("Reward", "  --reward_funcs", "`reward` is also mentioned in the text of"),
        ("lr-scheduler-type", "  --lr_scheduler_type", ""),
    ],
)
def test_help_with_a_topic(capsys: pytest.CaptureFixture[str], topic: str, begins: str, holds: str) -> None:
    for words in (["--help", topic], ["run.yaml", "-h", topic]):
        assert main(["train", *words]) == 0
        text = capsys.readouterr().out
        assert text.startswith(begins) and holds in text


def test_version() -> None:
    done, _ = command("--version")
    assert done.stdout == f"online-dpo {online_dpo.__version__}\n"


def test_a_bad_run_file_is_refused_within_two_seconds(folder: Path) -> None:
    write(folder / "run.yaml", {**GOOD, "learning_rat": 1, "max_steps": "ten"})
    done, seconds = command("train", "run.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: run.yaml:5: `learning_rat` is not a field. Did you mean `learning_rate`?\n"
        "error: run.yaml:6: `max_steps` is 'ten'; wanted: a whole number.\n"
    )
    assert seconds < 2 * SLACK


def test_a_missing_run_file_and_none_at_all(folder: Path) -> None:
    done, _ = command("train", "run.yaml", cwd=folder)
    assert (done.returncode, done.stderr) == (2, "error: run.yaml: there is no such file.\n")
    done, _ = command("train", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: online-dpo train [run.yaml]")


def test_importing_the_package_loads_no_torch() -> None:
    imports = "import sys, online_dpo, online_dpo.cli.runfile.run_file"
    code = f"{imports}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    source = str(Path(online_dpo.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
    )
    assert done.stdout == "False False\n"
    assert online_dpo.OnlineDPOConfig is OnlineDPOConfig
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = online_dpo.Nothing


# --- while training -------------------------------------------------------------------------------------------------


def test_the_command_that_resumes_keeps_the_other_words() -> None:
    from online_dpo.cli.train import resume_words  # loads the trainer

    words = ["run.yaml", "--resume-from-checkpoint", "old", "--beta", "0.1", "0.2", "--resume_from_checkpoint=older"]
    assert resume_words(words, "new") == ["run.yaml", "--beta", "0.1", "0.2", "--resume_from_checkpoint", "new"]


def test_warnings_are_one_line_without_a_place_in_the_code() -> None:
    usual = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("Ignored without\n  a reward: x.", UserWarning, "train.py", 86) == (
            "warning: Ignored without a reward: x.\n"
        )
        assert "library.py:7: DeprecationWarning: old" in warnings.formatwarning(
            "old", DeprecationWarning, "library.py", 7, line=""
        )
    assert warnings.formatwarning is usual


def test_stopping_by_overoptimisation_needs_evaluations(folder: Path) -> None:
    run = write(folder / "run.yaml", {**GOOD, "overoptimisation": "stop"})
    assert problems_of(run) == [
        f"{run}:{len(GOOD) + 1}: `overoptimisation: stop` compares evaluations. Give `eval_strategy` and `eval_steps`."
    ]
