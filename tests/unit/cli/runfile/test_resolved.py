"""The settings that a run writes down of itself plan the same run again, wherever they stand."""

import os

import pytest
import yaml

from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.resolved import resolved_settings
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.training.session_facts import as_yaml
from support import tiny

FEEDBACK = """
def words(completions, **_):
    return [0.0 for _ in completions]

def judge(prompt, first, second):
    return 0.5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a run file's parts, beside the working folder."""
    place = tmp_path / "parts"
    place.mkdir()
    tiny.causal_lm().save_pretrained(place / "policy")
    tiny.tokenizer().save_pretrained(place / "policy")
    (place / "data.jsonl").write_text('{"prompt": "w1 w2"}\n' * 8)
    (place / "feedback.py").write_text(FEEDBACK)
    (place / "extra.py").write_text("X = 1\n")
    (place / "rubric.txt").write_text("Be brief.\n")
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.chdir(tmp_path)
    return place


BASE = dict(model_name_or_path="./policy", dataset_name="data.jsonl", max_steps=3, use_cpu=True, output_dir="out")
CASES = {
    "a reward": dict(reward_funcs=["feedback.py:words"]),
    "gold": dict(
        reward_funcs="feedback.py:words", eval_reward_funcs=["feedback.py:words"], eval_dataset_name="data.jsonl"
    ),
    "a judge of one's own": dict(judge="feedback.py:judge", eval_judge="feedback.py:judge"),
    "a language model": dict(
        judge="llm",
        judge_kwargs={"model": "m", "base_url": "http://localhost:1/v1", "rubric_file": "rubric.txt", "cache": None},
    ),
    "plugins": dict(reward_funcs=["feedback.py:words"], plugins=["extra.py"]),
    "how the model is loaded": dict(
        reward_funcs=["feedback.py:words"], dtype="bfloat16", model_init_kwargs={"low_cpu_mem_usage": True}
    ),
    "an adapter": dict(reward_funcs=["feedback.py:words"], use_peft=True, lora_r=4, lora_target_modules="all-linear"),
    "resumed": dict(reward_funcs=["feedback.py:words"], overwrite_output_dir=True),
}


@pytest.mark.parametrize("case", CASES)
def test_they_plan_the_same_run_from_another_folder(folder, tmp_path, monkeypatch, case):
    (folder / "run.yaml").write_text(yaml.safe_dump({**BASE, **CASES[case]}))
    plan = plan_run(folder / "run.yaml", ["--beta", "0.2"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run.yaml").write_text(as_yaml(resolved_settings(plan)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = plan_run(tmp_path / "elsewhere" / "run.yaml", [])
    assert facts(again, tmp_path) == facts(plan, tmp_path)
    assert again.training["beta"] == [0.2] or again.training["beta"] == 0.2
    assert again.training["output_dir"] == str(tmp_path / "out")


OF_CODE = ("reward_funcs", "judge", "eval_reward_funcs", "eval_judge", "plugins", "judge_kwargs", "eval_judge_kwargs")
OF_A_START = ("overwrite_output_dir", "output_dir", "resume_from_checkpoint")


def facts(plan, root):
    """A plan in comparable values: files as they lie on the disk."""
    run = {name: located(value, root) for name, value in vars(plan.run).items() if name not in OF_CODE}
    training = {name: located(value, root) for name, value in plan.training.items() if name not in OF_A_START}
    code = [(one.file, one.module, one.name) for one in (*plan.reward_funcs, *plan.eval_reward_funcs)]
    judges = [None if one is None else judge_facts(one, root) for one in (plan.judge, plan.eval_judge)]
    return run, training, code, judges, [one.module.file for one in plan.plugins.modules]


def judge_facts(judge, root):
    if isinstance(judge, BuiltInJudge):
        return judge.folder, {name: located(value, root) for name, value in judge.options.items()}
    return judge.file, judge.name


def located(value, root):
    if isinstance(value, str) and (root / value).exists():
        return os.path.realpath(root / value)
    return value


def test_no_token_is_in_them(folder):
    (folder / "run.yaml").write_text(yaml.safe_dump({**BASE, "reward_funcs": ["feedback.py:words"]}))
    plan = plan_run(folder / "run.yaml", ["--hub_token", "hf_abcdefgh"])
    assert "hf_abcdefgh" not in as_yaml(resolved_settings(plan))
