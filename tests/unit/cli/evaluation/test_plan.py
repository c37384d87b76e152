"""`online-dpo eval` of a run file: what is taken from the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from online_dpo.cli.evaluation.options import FROM_THE_RUN, RUN_FIELDS, EvalConfig
from online_dpo.cli.evaluation.plan import plan_eval
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.schema import load_fields
from support.eval_folders import MODELS, PROMPTS, run


def test_options_have_names_of_their_own_and_fields_exist():
    known = load_fields()
    assert not {field.name for field in dataclasses.fields(EvalConfig)} & set(known)
    assert set(RUN_FIELDS) | set(FROM_THE_RUN) <= set(known) and not set(RUN_FIELDS) & set(FROM_THE_RUN)


RUN = {
    "model_name_or_path": "policy",
    "dataset_name": "owner/data",
    "eval_dataset_name": "prompts.jsonl",
    "reward_funcs": "rewards.py:words",
    "reward_weights": [2.0],
    "missing_eos_penalty": 1.0,
    "length_penalty": 0.25,
    "output_dir": "other",
    "max_new_tokens": 8,
    "max_length": 64,
    "num_completions": 4,
    "use_cpu": True,
}


def plan(*words, **changes):
    fields = {name: value for name, value in {**RUN, **changes}.items() if value is not None}
    Path("run.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return plan_eval(Path("run.yaml"), words)


def test_a_run_file_is_enough(folder, capsys):
    made = plan()
    assert (made.model, made.against, made.prompts.source) == ("other", "policy", "prompts.jsonl")
    assert [reward.name for reward in made.rewards] == ["words"] and made.trained_on
    expected = {"max_new_tokens": 8, "max_length": 64, "use_cpu": True}
    assert made.training == {**expected, "reward_weights": [2.0], "missing_eos_penalty": 1.0, "length_penalty": 0.25}
    assert plan(eval_limit=3).prompts.limit == 3 and plan("--limit", "2", eval_limit=3).prompts.limit == 2
    assert plan(ref_model_name_or_path="other").against == "other"
    plan("--temperature", "0.5", eval_limit=3)
    assert run("run.yaml", "--json", "figures.json", "--output", "answers.jsonl") == 0
    assert "warning: The scorer is the one that the model was trained on." in capsys.readouterr().err
    result = json.loads(Path("figures.json").read_text())
    assert result["prompts"] == 3 and result["trained_on_scorer"] is True
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    for side in (side for row in rows for side in (row["model"], row["against"])):
        penalty = (0.0 if side["ended"] else 1.0) + 0.25 * side["tokens"]
        assert side["score"] == 2.0 * len(side["text"].split()) - penalty


def test_the_runs_gold_scorer_comes_before_the_trained_one(folder):
    gold = plan(eval_reward_funcs="rewards.py:forced")
    assert [reward.name for reward in gold.rewards] == ["forced"] and not gold.trained_on
    assert not {"reward_weights", "missing_eos_penalty", "length_penalty"} & gold.training.keys()
    assert (
        plan("--missing_eos_penalty", "2", eval_reward_funcs="rewards.py:forced").training["missing_eos_penalty"] == 2
    )
    assert plan(eval_reward_model_path="owner/model").rewards == ("owner/model",)
    local = {"model": "m", "base_url": "http://localhost:1/v1"}
    judged = plan(eval_judge="llm", eval_judge_kwargs=local)
    assert judged.judge == BuiltInJudge(None, local) and judged.rewards == () and not judged.trained_on
    replaced = plan("--reward", "rewards.py:forced", eval_judge="llm", eval_judge_kwargs=local)
    assert replaced.judge is None and [reward.name for reward in replaced.rewards] == ["forced"]
    judged = plan("--judge", "llm", "--judge_kwargs", json.dumps(local))
    assert judged.judge == BuiltInJudge(None, local) and not judged.trained_on
    trained = plan(reward_funcs=None, judge="llm", judge_kwargs=local)
    assert trained.judge == BuiltInJudge(None, local) and trained.trained_on


def test_training_prompts_are_never_taken_unasked(folder):
    with pytest.raises(UsageError, match=r"names none \(`eval_dataset_name` or `dataset_test_split`\)"):
        plan(eval_dataset_name=None)
    made = plan(eval_dataset_name=None, dataset_test_split="test", dataset_config="main")
    assert (made.prompts.source, made.prompts.split, made.prompts.config) == ("owner/data", "test", "main")


def test_a_run_that_has_not_ended_says_where_its_checkpoints_are(folder):
    for step in (9, 10):
        (folder / "out" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds no model. Give --model, such as --model out/checkpoint-10\."):
        plan(output_dir="out")


def test_a_column_that_a_reward_needs_is_missed_before_the_models_answer(folder, capsys):
    assert run(*MODELS, *PROMPTS, "--reward", "rewards.py:checks", "--output", "answers.jsonl") == 2
    said = "`checks` needs the argument `solution`, but `prompts` has no such column"
    assert said in capsys.readouterr().err and not Path("answers.jsonl").exists()
