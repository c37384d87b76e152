"""`online-dpo eval`: what it takes, what it refuses before anything is loaded, what it reports and writes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import online_dpo
from online_dpo.cli.evaluation.options import FROM_THE_RUN, RUN_FIELDS, EvalConfig
from online_dpo.cli.evaluation.plan import plan_eval
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.main import main
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.stats.intervals import wilson_interval
from support import tiny
from support.endpoint import error, says, serving, shown

REWARDS = """
def words(completions):
    return [float(len(c.split())) for c in completions]


def forced(completions):
    return [float(c.split()[:1] == ["w7"]) for c in completions]


def partly(prompts, completions):
    first = prompts[0].split()[0]
    return [None if p.split()[0] == first else float(len(c.split())) for p, c in zip(prompts, completions)]


def checks(completions, solution):
    return [0.0] * len(completions)


def note(completions, **columns):
    columns = {name: columns[name] for name in ("id", "day", "n", "meta") if name in columns}
    with open("seen.txt", "a") as file:
        file.writelines(repr(dict(zip(columns, row))) + "\\n" for row in zip(*columns.values()))
    return [0.0] * len(completions)


def fails(completions):
    raise ConnectionError("away")


def second(prompts, pairs, shuffle_order=True):
    return [1] * len(prompts)
"""
SHORT = ("--max_new_tokens", "8", "--max_length", "64", "--use_cpu")
LENGTHS = [4, 5, 6, 7] * 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two models, prompts and reward functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, seed in (("policy", 0), ("other", 5)):
        save(name, tiny.causal_lm(seed=seed, sharpness=1.0))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p.content}) for p in tiny.prompts(LENGTHS)))
    Path("rewards.py").write_text(REWARDS)
    return tmp_path


def save(name, model, tokenizer=None):
    model.save_pretrained(name)
    (tokenizer or tiny.tokenizer()).save_pretrained(name)


def forced_model(word):
    """Whatever the prompt, it says this word and ends."""
    model = tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False)
    start, end = tiny.tokenizer().convert_tokens_to_ids(word), tiny.EOS
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0  # every token says `word` next
        model.model.embed_tokens.weight[start, 0] = 0.0
        model.model.embed_tokens.weight[start, 1] = 1.0  # after which comes the end
        model.lm_head.weight.zero_()
        model.lm_head.weight[start, 0] = 50.0
        model.lm_head.weight[end, 1] = 50.0
    return model


def run(*words):
    return main(["eval", *map(str, words)])


def figures(capsys, *words):
    """The JSON of a run that must succeed, and what it printed."""
    code = run(*words, "--json", "figures.json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(Path("figures.json").read_text()), printed


def problems_of(*words, file=None):
    with pytest.raises(UsageError) as caught:
        plan_eval(file, words)
    return list(caught.value.problems)


# --- results --------------------------------------------------------------------------------------------------------


def test_a_model_against_itself_is_even_to_the_last_duel(folder, capsys):
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "policy", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--samples", 2),
    )
    assert (result["wins"], result["ties"], result["losses"], result["duels"]) == (0, 32, 0, 32)
    assert result["win_rate"]["value"] == 0.5 and result["length_controlled_win_rate"]["value"] == 0.5
    assert result["score"]["difference"]["value"] == 0.0 and result["score"]["difference"]["high"] == 0.0
    assert result["kl"] == {"value": 0.0, "standard_error": 0.0}
    assert result["tokens"]["model"] == result["tokens"]["against"]


@pytest.mark.slow
def test_types_of_weights_are_no_difference_between_models(folder, capsys):
    """What was trained from a checkpoint in bf16 is saved in fp32, and compared with that checkpoint."""
    half = tiny.causal_lm(sharpness=1.0).bfloat16()
    save("before", half)
    save("after", half.float())
    get_peft_model(half, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    rewrite_base("adapter", "before")
    tiny.tokenizer().save_pretrained("adapter")
    for model, against in (("after", "before"), ("after", "adapter")):
        words = ("--model", model, "--against", against, "--prompts", "prompts.jsonl", "--reward", "rewards.py:words")
        result, _ = figures(capsys, *words, *SHORT)
        assert result["kl"] == {"value": 0.0, "standard_error": 0.0} and result["ties"] == result["duels"]


def rewrite_base(adapter, base):
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_the_better_model_wins_and_everything_printed_stands_in_the_json(folder, capsys):
    save("good", forced_model("w7"))
    save("bad", forced_model("w8"))
    words = ("--model", "good", "--against", "bad", "--prompts", "prompts.jsonl", "--reward", "rewards.py:forced")
    result, printed = figures(capsys, *words, *SHORT, "--output", "answers.jsonl", "--kl", "false")
    assert (result["wins"], result["ties"], result["losses"]) == (16, 0, 0)
    low, high = wilson_interval(1.0, 16)
    assert result["win_rate"] == {"value": 1.0, "low": low, "high": high, "interval": "wilson"}
    assert result["score"]["model"]["value"] == 1.0 and result["score"]["against"]["value"] == 0.0
    assert result["ended"] == {"model": 1.0, "against": 1.0} and result["tokens"] == {"model": 2.0, "against": 2.0}
    assert result["kl"] is None and result["scored_by"] == "forced"
    assert f"Win rate 100.0%, 95 % interval {low:.1%} to {high:.1%} (wilson)" in printed.out
    assert "Wins 16, ties 0, losses 0 of 16" in printed.out and "KL" not in printed.out
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and rows[3]["row"] == 3 and rows[3]["prompt"] == tiny.prompts(LENGTHS)[3].content
    assert rows[3]["model"] == {"text": " w7", "tokens": 2, "ended": True, "score": 1.0}
    assert rows[3]["against"] == {"text": " w8", "tokens": 2, "ended": True, "score": 0.0}
    assert {row["preference"] for row in rows} == {1.0}
    turned, _ = figures(capsys, "--model", "bad", "--against", "good", *words[4:], *SHORT)
    assert turned["losses"] == 16 and turned["win_rate"]["value"] == 0.0


def test_the_table_shows_the_figures_of_the_json(folder, capsys):
    result, printed = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--samples", 3),
    )
    cells = {
        parts[1].strip(): [part.strip() for part in parts[2:4]]
        for line in printed.out.splitlines()
        if len(parts := re.split("[│┃]", line)) == 5
    }
    assert cells["tokens"] == [f"{result['tokens'][side]:.4g}" for side in ("model", "against")]
    assert cells["ended by themselves"] == [f"{result['ended'][side]:.1%}" for side in ("model", "against")]
    assert cells["scores missing"] == ["0", "0"]
    for place, side in enumerate(("model", "against")):
        one = result["score"][side]
        assert cells["score"][place] == f"{one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
    rate, kl = result["win_rate"], result["kl"]
    assert rate["interval"] == "bootstrap" and result["duels"] == 48
    assert f"Win rate {rate['value']:.1%}, 95 % interval {rate['low']:.1%} to {rate['high']:.1%} (boot" in printed.out
    assert f"KL {kl['value']:.4g} nats, standard error {kl['standard_error']:.4g}" in printed.out


def test_both_models_answer_with_the_same_random_numbers_and_the_kl_is_that_of_plain_samples(folder, capsys):
    """Against the engine and the models themselves; the temperature is not 1, so the KL has samples of its own."""
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--seed", 7, "--temperature", 0.5, "--output", "answers.jsonl"),
    )
    prompts, key = tiny.prompts(LENGTHS), RolloutKey(7, 0, Stream.ANSWERS)
    models = {name: tiny.causal_lm(seed=seed, sharpness=1.0) for name, seed in (("model", 0), ("against", 5))}
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    for side, model in models.items():
        engine = TransformersEngine(model, tiny.tokenizer())
        groups = engine.generate(prompts, 1, SamplingParams(8, (tiny.EOS,), temperature=0.5), key)
        assert [row[side]["text"] for row in rows] == [group.completions[0].text for group in groups]
    plain = TransformersEngine(models["model"], tiny.tokenizer()).generate(
        prompts, 1, SamplingParams(8, (tiny.EOS,)), RolloutKey(7, 0, Stream.FOR_KL)
    )
    ratios = []
    for group in plain:
        ids = torch.tensor([[*group.prompt.token_ids, *group.completions[0].token_ids]])
        at = len(group.prompt.token_ids)
        with torch.no_grad():
            logps = [model(ids).logits[0, at - 1 : -1].log_softmax(-1) for model in models.values()]
        own, others = (x.gather(-1, ids[0, at:, None]).sum().item() for x in logps)
        ratios.append(own - others)
    assert result["kl"]["value"] == pytest.approx(sum(ratios) / 16, abs=1e-4)
    assert result["kl"]["standard_error"] == pytest.approx(torch.tensor(ratios).std().item() / 4, abs=1e-4)


def test_greedy_answers_are_the_most_probable_tokens(folder, capsys):
    words = ("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words")
    result, _ = figures(capsys, *words, *SHORT, "--greedy", "--limit", 2, "--output", "answers.jsonl")
    assert result["prompts"] == 2 and result["temperature"] is None and result["kl"]["value"] is not None
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    prompt = tiny.prompts(LENGTHS)[0]
    made = tiny.causal_lm(sharpness=1.0).generate(
        torch.tensor([prompt.token_ids]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=tiny.EOS
    )[0, len(prompt.token_ids) :]
    assert rows[0]["model"]["text"] == " " + tiny.tokenizer().decode(made, skip_special_tokens=True)


def test_columns_reach_the_reward_as_they_stand_in_the_file(folder, capsys):
    Path("x.csv").write_text("prompt,id,n,day\nw1 w2,007,18,NA\nw3 w4,1e5,,2024-01-31\n")
    words = ("--model", "policy", "--against", "other", "--prompts", "x.csv", "--reward", "rewards.py:note", *SHORT)
    figures(capsys, *words, "--kl", "false", "--dataset_types", "{n: int64}")
    rows = [{"id": "007", "day": "NA", "n": 18}, {"id": "1e5", "day": "2024-01-31", "n": None}]
    assert set(Path("seen.txt").read_text().splitlines()) == {repr(row) for row in rows}
    assert run(*words, "--dataset_types", "{m: int64}") == 2
    assert "x.csv has no column m, for which a type is given" in capsys.readouterr().err


def test_missing_scores_are_counted(folder, capsys):
    """The scorer does not apply to the first prompt, nor to others that begin with the same word."""
    first = [prompt.content.split()[0] for prompt in tiny.prompts(LENGTHS)]
    missing = first.count(first[0])
    result, printed = figures(
        capsys,
        *("--model", "policy", "--against", "policy", "--prompts", "prompts.jsonl", "--reward", "rewards.py:partly"),
        *SHORT,
    )
    assert result["undecidable"] == missing and result["ties"] == 16 - missing
    assert result["score"]["model"]["missing"] == missing
    assert f"undecidable {missing} of 16" in printed.out


def longest_wins(body, number):
    first, second = shown(body)
    return says("A", 0.5 if len(first) == len(second) else 0.9 if len(first) > len(second) else 0.1)


def test_a_language_model_judges_in_both_orders(folder, capsys):
    with serving(longest_wins) as endpoint:
        kwargs = json.dumps({"model": "m", "base_url": endpoint.url, "cache": None})
        result, printed = figures(
            capsys,
            *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--judge", "llm"),
            *("--judge_kwargs", kwargs, "--output", "answers.jsonl", *SHORT),
        )
        asked = len(endpoint.seen)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    differ = [row for row in rows if row["model"]["text"] != row["against"]["text"]]
    assert asked == 2 * len(differ) > 0
    for row in differ:
        longer = len(row["model"]["text"]) - len(row["against"]["text"])
        assert row["preference"] == pytest.approx(0.5 if longer == 0 else 0.9 if longer > 0 else 0.1)
    assert result["win_rate"]["interval"] == "bootstrap" and result["score"] is None and result["scored_by"] == "m"
    assert "score" not in printed.out.replace("scored by", "")


def test_a_judge_that_likes_a_place_is_even(folder, capsys):
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--judge", "rewards.py:second"),
        *SHORT,
    )
    assert result["ties"] == 16 and result["win_rate"]["value"] == 0.5


# --- what goes wrong ------------------------------------------------------------------------------------------------


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


MODELS = ("--model", "policy", "--against", "other")
PROMPTS = ("--prompts", "prompts.jsonl")
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
        environment = {**os.environ, "PYTHONPATH": str(Path(online_dpo.__file__).parent.parent)}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "online_dpo", "eval", *words], env=environment, capture_output=True, text=True
        )
        return done, time.monotonic() - started

    done, seconds = command(*MODELS, *PROMPTS)
    assert done.returncode == 2 and done.stdout == "" and seconds < 2
    assert done.stderr == "error: command line: nothing scores the answers. Give --reward or --judge.\n"
    done, seconds = command("--help")
    assert done.returncode == 0 and seconds < 2  # this machine may be busy
    options = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert options >= {f"--{field.name}" for field in dataclasses.fields(EvalConfig)} | {f"--{n}" for n in RUN_FIELDS}
    done, _ = command()
    assert done.returncode == 2 and done.stderr.startswith("usage: online-dpo eval [run.yaml]")


# --- run files ------------------------------------------------------------------------------------------------------


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
