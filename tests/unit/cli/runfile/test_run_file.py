"""Run files: the plan of a good one, and all problems of a bad one at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_dpo.cli.runfile.paths import looks_like_path
from online_dpo.cli.runfile.references import load_reference, parse_reference
from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.run_file import plan_run
from support.checkpoint_folders import whole_checkpoint
from support.plans import GOOD, problems_of, write

SO = (
    "Leave `resume_from_checkpoint` out to start a run, or give `auto`, which starts one if there is no checkpoint and "
    "resumes it if there is."
)


@pytest.mark.smoke
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
        f"run.yaml:9: `resume_from_checkpoint`: trainer_output holds no checkpoint. {SO}",
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
    assert problems_of(run_file) == [f"{run_file}:5: `resume_from_checkpoint`: out holds no checkpoint. {SO}"]
    assert plan_run(run_file, ["--resume_from_checkpoint", "auto"]).training["resume_from_checkpoint"] == "auto"
    assert problems_of(run_file, "--resume_from_checkpoint", "out/checkpoint-3") == [
        "command line: `resume_from_checkpoint`: there is no folder out/checkpoint-3."
    ]
    (folder / "out" / "checkpoint-3").mkdir(parents=True)
    assert problems_of(run_file, "--resume_from_checkpoint", "out") == [
        "command line: `resume_from_checkpoint`: out is no checkpoint of a run (no trainer_state.json). It holds "
        "checkpoint-3: give one of them."
    ]
    (folder / "out" / "checkpoint-3").rmdir()
    made = whole_checkpoint(folder / "out", 3)
    assert plan_run(run_file, []).training["resume_from_checkpoint"] is True
    given = plan_run(run_file, ["--resume_from_checkpoint", "out/checkpoint-3"]).training["resume_from_checkpoint"]
    assert given == "out/checkpoint-3"
    assert problems_of(run_file, "--target_kl", "6") == [
        f"{run_file}:5: `resume_from_checkpoint`: out holds no checkpoint to resume from: not from checkpoint-3: "
        "beta.json is missing: beta, which `target_kl` adapts (a run without this option does not write it); "
        "`resume_anyway` goes on without it."
    ]
    (made / "optimizer.pt").write_text("cut")
    assert problems_of(run_file, "--resume_from_checkpoint", "out/checkpoint-3") == [
        "command line: `resume_from_checkpoint`: out/checkpoint-3 cannot be resumed from: optimizer.pt has 3 bytes, "
        "not the 12 that were written."
    ]


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


def test_stopping_by_overoptimisation_needs_evaluations(folder: Path) -> None:
    run = write(folder / "run.yaml", {**GOOD, "overoptimisation": "stop"})
    assert problems_of(run) == [
        f"{run}:{len(GOOD) + 1}: `overoptimisation: stop` compares evaluations. Give `eval_strategy` and `eval_steps`."
    ]
