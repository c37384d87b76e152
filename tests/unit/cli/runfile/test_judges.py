"""Judges in run files: language models, pairwise models, and what each does not take."""

from __future__ import annotations

import json

import pytest
import yaml

from online_dpo.cli.evaluation.plan import plan_eval
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import judge_of_run, plan_run


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = {"model_name_or_path": "owner/model", "dataset_name": "owner/data", "judge": "llm"}
LOCAL = {"model": "org/judge", "base_url": "http://localhost:8000/v1"}


def plan(folder, **run):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **run}, sort_keys=False))
    return plan_run(path, [])


def problem(folder, **run):
    with pytest.raises(UsageError) as caught:
        plan(folder, **run)
    (text,) = caught.value.problems
    return text


def test_a_language_model_as_judge_of_a_run(home):
    beside = home / "runs"
    beside.mkdir()
    (beside / "rubric.txt").write_text("Shorter.")
    given = {**LOCAL, "rubric_file": "rubric.txt", "max_cost": "5", "input_price": 1, "template": "reasoned"}
    checked = {**given, "rubric_file": str(beside / "rubric.txt"), "max_cost": 5.0}
    assert plan(beside, judge_kwargs=given).judge == BuiltInJudge(None, checked)


def test_a_pairwise_model_as_judge_of_a_run(home):
    (home / "house").mkdir()
    (home / "house" / "config.json").write_text("{}")
    made = plan(home, judge="house", judge_kwargs={"batch_size": 4})
    assert made.judge == BuiltInJudge(home / "house", {"batch_size": 4})
    (home / "house" / "config.json").unlink()
    assert "is no model folder" in problem(home, judge="house")


CLASSIFIER, LLAMA = {"architectures": ["BertForSequenceClassification"]}, {"architectures": ["LlamaForCausalLM"]}
PAIRRM = {"architectures": ["DebertaV2PairRM"], "source_prefix_id": 5, "cand1_prefix_id": 6, "cand2_prefix_id": 7}
PAIRRM |= {"n_tasks": 1, "drop_out": 0.05}


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        (CLASSIFIER, {"template": "{prompt} {first} {second}"}),
        (LLAMA, {"template": "{prompt} {first} {second}", "letters": ["1", "2"]}),
        (PAIRRM, {"max_tokens": 3370, "batch_size": 2}),
    ],
)
def test_options_of_each_kind_of_pairwise_model(home, config, kwargs):
    (home / "house").mkdir()
    (home / "house" / "config.json").write_text(json.dumps(config))
    assert plan(home, judge="house", judge_kwargs=kwargs).judge == BuiltInJudge(home / "house", kwargs)


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        (CLASSIFIER, {"template": "{prompt} {first}"}, "The template has no place for {second}"),
        (CLASSIFIER, {"letters": ["A", "B"]}, "A sequence classifier as judge takes no `letters`; it takes `template`"),
        (PAIRRM, {"template": "{prompt} {first} {second}"}, "A PairRM as judge takes no `template`"),
        (PAIRRM, {"batch_size": 0}, "`batch_size` must be 1 or more; it is 0"),
        (PAIRRM, {"batchsize": 2}, "`batchsize` is not one of `judge_kwargs`. Did you mean `batch_size`?"),
        (LLAMA, {"letters": ["A", "A"]}, "`letters` must be two different answers"),
        (LLAMA, {"max_tokens": 5}, "A causal language model as judge takes no `max_tokens`"),
        ({"ranker_type": "pairranker", "model_type": "deberta"}, {}, "`judge: house`: this is PairRM in LLM-Blender's"),
        ({"architectures": ["DebertaV2PairRM"]}, {}, "must say `source_prefix_id`, `cand1_prefix_id`"),
    ],
)
def test_wrong_options_of_pairwise_models(home, config, kwargs, message):
    (home / "house").mkdir()
    (home / "house" / "config.json").write_text(json.dumps(config))
    assert message in problem(home, judge="house", **({"judge_kwargs": kwargs} if kwargs else {}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "run.yaml:3: `judge: llm`: `judge_kwargs` needs at least `model`"),
        ({"model": "m"}, "no API key for https://api.openai.com/v1"),
        ({**LOCAL, "rubrik": "x"}, "`rubrik` is not one of `judge_kwargs`. Did you mean `rubric`?"),
        ({**LOCAL, "votes": "many"}, "`votes` is 'many'; wanted: a whole number."),
        ({**LOCAL, "votes": 0}, "`votes` must be 1 or more"),
        ({**LOCAL, "rubric_file": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
    ],
)
def test_wrong_judge_kwargs(home, kwargs, message):
    assert message in problem(home, **({"judge_kwargs": kwargs} if kwargs else {}))


def test_judge_kwargs_that_are_no_mapping_are_one_problem(home):
    assert problem(home, judge_kwargs="gpt").endswith("run.yaml:4: `judge_kwargs` is 'gpt'; wanted: a mapping or null.")


@pytest.mark.parametrize("name", ["./away", "llm-blender/PairRM-hf", "LLM", "mine.py"])
def test_a_judge_that_is_nowhere_is_told_every_form(home, name):
    said = problem(home, judge=name)
    assert f"`judge` is {name!r}, but there is no folder" in said
    assert (
        "Give `llm`, `human`, the folder of a pairwise model on this disk, `file.py:name` or `package.module:name`."
        in said
    )


def test_judge_kwargs_that_nothing_takes_are_warned_of(home):
    (home / "mine.py").write_text("def judge(prompts, completions, shuffle_order=True): ...\n")
    (warning,) = plan(home, judge="mine.py:judge", judge_kwargs=LOCAL).warnings
    assert "`judge_kwargs` is ignored" in warning


def test_people_as_judge_of_a_run_take_no_settings(home):
    made = plan(home, judge="human", human_timeout=600)
    assert made.judge == BuiltInJudge(None, {}, human=True)
    assert "`judge: human`: people take no `judge_kwargs`" in problem(home, judge="human", judge_kwargs={"model": "m"})


def test_people_judge_neither_a_file_of_pairs_nor_an_evaluation(home):
    path = home / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "judge": "human"}))
    with pytest.raises(UsageError, match="judge: llm"):
        judge_of_run(path)
    with pytest.raises(UsageError, match="people are asked in training alone"):
        plan_eval(path, ["--model", "owner/model"])
