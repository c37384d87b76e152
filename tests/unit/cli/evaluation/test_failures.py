"""`online-dpo eval`: what it refuses before anything is loaded, and what ends it later."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest

from online_dpo.cli.evaluation.options import RUN_FIELDS, EvalConfig
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from support import tiny
from support.endpoint import error, serving
from support.eval_folders import LENGTHS, MODELS, PROMPTS, SHORT, figures, problems_of, run, save
from support.processes import run_python


@pytest.mark.parametrize("where", ["refuses", "fails"])
def test_a_judge_that_fails_is_an_error_in_one_line(folder, capsys, where):
    answer = error(401, "bad key") if where == "refuses" else error(400, "no such format")
    with serving(lambda body, number: answer) as endpoint:
        kwargs = json.dumps({"model": "m", "base_url": endpoint.url, "cache": None, "max_failure_share": 1})
        words = ("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--judge", "llm")
        files = ("--json", "figures.json", "--output", "answers.jsonl")
        assert run(*words, "--judge_kwargs", kwargs, *SHORT, *files) == 1
    printed = capsys.readouterr()
    assert ("bad key" in printed.err) == (where == "refuses") and printed.err.count("error:") == 1
    assert ("no such format" in printed.err) == (where == "fails")
    assert "Traceback" not in printed.err and not Path("figures.json").exists()
    assert printed.err.endswith("The answers, without scores, are in answers.jsonl\n") and "written" not in printed.out
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    prompts, key = tiny.prompts(LENGTHS), RolloutKey(42, 0, Stream.ANSWERS)
    for side, seed in (("model", 0), ("against", 5)):
        engine = TransformersEngine(tiny.causal_lm(seed=seed, sharpness=1.0), tiny.tokenizer())
        groups = engine.generate(prompts, 1, SamplingParams(8, (tiny.EOS,), temperature=0.9), key)
        assert [row[side]["text"] for row in rows] == [group.completions[0].text for group in groups]
        assert all(row[side].keys() == {"text", "tokens", "ended"} for row in rows)
    assert {row["preference"] for row in rows} == {None} and [row["row"] for row in rows] == list(range(16))


def test_a_reward_function_that_fails_is_an_error_in_one_line(folder, capsys):
    words = ("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:fails")
    assert run(*words, *SHORT) == 1
    said = capsys.readouterr().err
    assert "error: Reward function `fails` raised ConnectionError: away" in said and "answers" not in said


def test_another_tokenizer_has_no_kl(folder, capsys, monkeypatch):
    from online_dpo.evaluation import head_to_head

    other = tiny.tokenizer()
    other.add_tokens(["new"])
    save("other", tiny.causal_lm(seed=5, sharpness=1.0, vocab_size=tiny.VOCABULARY + 1), other)
    words = ("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words")
    result, printed = figures(capsys, *words, *SHORT)
    assert result["kl"] is None and result["duels"] == 16 and "KL" not in printed.out

    def no_model(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(head_to_head, "load_causal_lm", no_model)
    assert run(*words, *SHORT, "--kl") == 2
    assert "error: `kl`: policy and other have different vocabularies" in capsys.readouterr().err
    assert run(*words, "--max_new_tokens", 300, "--max_length", 400) == 2
    assert "`policy` has room for 128 tokens" in capsys.readouterr().err


REWARD = ("--reward", "rewards.py:words")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*MODELS, *PROMPTS), "command line: nothing scores the answers. Give --reward or --judge."),
        ((*MODELS, *REWARD), "command line: `prompts` is missing: prompts that were not trained on. Give --prompts."),
        ((*MODELS[:2], *PROMPTS, *REWARD), "command line: `against` is missing: the model to compare with. Give --ag"),
        ((*MODELS[2:], *PROMPTS, *REWARD), "command line: `model` is missing: the model to evaluate. Give --model."),
        (
            ("--model", "./away", *MODELS[2:], *PROMPTS, *REWARD),
            "command line: `model`: there is no folder ./away.",
        ),
        (
            ("--model", "policy/checkpoint-9", *MODELS[2:], *PROMPTS, *REWARD),
            "command line: `model`: there is no folder policy/checkpoint-9.",
        ),
        (("--model", "empty", *MODELS[2:], *PROMPTS, *REWARD), "command line: `model`: empty is no model folder: it"),
        ((*MODELS, "--prompts", "x.jsonl", *REWARD), "command line: `prompts` is 'x.jsonl', but there is no x.jsonl."),
        ((*MODELS, *PROMPTS, "--reward", "rewards.py:no"), "command line: `reward` 'rewards.py:no': `rewards.py` def"),
        ((*MODELS, *PROMPTS, "--reward", "empty"), "command line: `reward`: empty is no model folder"),
        ((*MODELS, *PROMPTS, *REWARD, "--judge", "llm"), "command line: `judge` is given beside `reward`."),
        ((*MODELS, *PROMPTS, "--judge", "llm"), "command line: `judge: llm`: `judge_kwargs` needs at least `model`"),
        ((*MODELS, *PROMPTS, *REWARD, "--samples", "0"), "command line: `samples` is 0; wanted: 1 or more."),
        ((*MODELS, *PROMPTS, *REWARD, "--samples", "1000000"), "command line: `samples` is above 10,000."),
        ((*MODELS, *PROMPTS, *REWARD, "--samples", "2", "--greedy"), "command line: `samples` is above 1, but with"),
        ((*MODELS, *PROMPTS, *REWARD, "--json", "no/x.json"), "command line: `json`: there is no folder no."),
        ((*MODELS, *PROMPTS, *REWARD, "--output", "empty"), "command line: `output`: empty is a folder."),
        (
            (*MODELS, *PROMPTS, *REWARD, "--temprature", "1"),
            "command line: `temprature` is not a field. Did you mean `",
        ),
        ((*MODELS, *PROMPTS, *REWARD, "--beta", "1"), "command line: `beta` is not a field."),
        (
            (*MODELS, *PROMPTS, *REWARD, "--output_dir", "x"),
            "command line: `output_dir` is read from the run file alone",
        ),
    ],
)
def test_what_is_refused_without_loading_anything(folder, words, message):
    Path("empty").mkdir()
    (problem,) = problems_of(*words)
    assert problem.startswith(message)


def test_a_refusal_takes_no_time_and_help_less_than_a_second(folder):
    def command(*words):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_python("-m", "online_dpo", "eval", *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of a processor: the machine may be busy
        return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    done, seconds = command(*MODELS, *PROMPTS)
    assert done.returncode == 2 and done.stdout == "" and seconds < 2
    assert done.stderr == "error: command line: nothing scores the answers. Give --reward or --judge.\n"
    done, seconds = command("--help")
    assert done.returncode == 0 and seconds < 2
    options = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert options >= {f"--{field.name}" for field in dataclasses.fields(EvalConfig)} | {f"--{n}" for n in RUN_FIELDS}
    done, _ = command()
    assert done.returncode == 2 and done.stderr.startswith("usage: online-dpo eval [run.yaml]")
