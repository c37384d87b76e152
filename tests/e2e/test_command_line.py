"""The command line from start to end on real text, as a user runs it: real files, real processes, small models."""

import gzip
import json
import os
import re
import resource
import shlex
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from online_dpo.data.convert import transcript_to_messages
from online_dpo.quickstart.comparisons import Comparison, Reply
from online_dpo.quickstart.models import (
    build_policy_config,
    build_reward_config,
    build_tokenizer,
    new_policy,
    new_reward_model,
    train_policy,
    train_reward_model,
)
from support import tiny
from support.endpoint import says, serving, shown

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the example data is not here")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


SMALL = ("--gradient_accumulation_steps", 1, "--gradient_checkpointing", "false", "--save_steps", 1000)
SMALL += ("--warmup_steps", 3, "--logging_steps", 1)


def online_dpo(*words, timeout=420):
    return subprocess.run(
        [sys.executable, "-m", "online_dpo", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=timeout,
    )


def rewards_of(output):
    return [float(value) for value in re.findall(r"^step .*? reward (-?[\d.e-]+)", output, flags=re.MULTILINE)]


def rise(rewards):
    """Mean of the last third minus that of the first, and the same in standard errors: above 3 is no accident."""
    third = len(rewards) // 3
    first, last = rewards[:third], rewards[-third:]
    difference = statistics.fmean(last) - statistics.fmean(first)
    error = ((statistics.variance(first) + statistics.variance(last)) / third) ** 0.5
    return difference, difference / error


@needs_data
def test_gsm8k_recipe_raises_its_reward(tmp_path):
    rows = [json.loads(line) for line in (DATA / "gsm8k-train.jsonl").read_text().splitlines()]
    short = sorted(rows, key=lambda row: len(row["question"]) + 2 * len(row["answer"]))[:700]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in short]
    tokenizer = build_tokenizer(texts, vocab_size=768)
    policy = new_policy(build_policy_config(tokenizer, hidden=96))
    examples = [(f"Question: {row['question']}\nAnswer:", " " + row["answer"]) for row in short]
    train_policy(policy, tokenizer, examples, epochs=4)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")

    done = online_dpo(
        *("train", "recipes/gsm8k.yaml", *SMALL),
        *("--dataset_name", DATA / "gsm8k-train.jsonl", "--dataset_config", "null"),
        *("--model_name_or_path", tmp_path / "policy", "--output_dir", tmp_path / "run"),
        *("--max_length", 320, "--max_new_tokens", 64, "--learning_rate", 3e-4, "--max_steps", 30),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = rewards_of(done.stdout)
    assert len(rewards) == 30
    difference, in_errors = rise(rewards)
    assert difference > 0.2 and in_errors > 3, (difference, in_errors)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert "format_reward" in (tmp_path / "run" / "README.md").read_text()


@needs_data
@pytest.mark.slow  # a reward model that is learned from raises its score in the quickstart's test as well
def test_hh_recipe_raises_the_reward_models_score(tmp_path):
    with gzip.open(DATA / "hh-rlhf-harmless-base-test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if len(transcript_to_messages(row["chosen"])) > 1][:800]
    tokenizer = build_tokenizer([row["chosen"] for row in rows], vocab_size=768)
    examples, comparisons = [], []
    for row in rows:
        prompt = transcript_to_messages(row["chosen"])[-2]["content"]  # the prompts of the run are cut to this turn
        chosen, rejected = (transcript_to_messages(row[name])[-1]["content"] for name in ("chosen", "rejected"))
        rendered = f"User: {prompt}\nAssistant:"
        examples += [(rendered, f" {chosen}"), (rendered, f" {rejected}")]
        shorter, longer = sorted((chosen, rejected), key=len)  # a preference that so small a reward model can learn
        comparisons.append(Comparison(rendered, (Reply(f" {shorter}"), Reply(f" {longer}")), ((0, 1),)))
    policy = new_policy(build_policy_config(tokenizer, hidden=96))
    train_policy(policy, tokenizer, examples)
    reward = new_reward_model(build_reward_config(tokenizer, hidden=96), policy)
    train_reward_model(reward, tokenizer, comparisons, epochs=2)
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    done = online_dpo(
        *("train", "recipes/hh.yaml", *SMALL),
        *("--dataset_name", DATA / "hh-rlhf-harmless-base-test.jsonl.gz"),
        *("--model_name_or_path", tmp_path / "policy", "--reward_model_path", tmp_path / "reward"),
        *("--output_dir", tmp_path / "run", "--max_prompt_length", 48, "--max_new_tokens", 32, "--num_completions", 4),
        *("--learning_rate", 1e-3, "--beta", 0.03, "--max_steps", 60, "--per_device_train_batch_size", 16),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    difference, in_errors = rise(rewards_of(done.stdout))
    assert difference > 0.1 and in_errors > 3, (difference, in_errors)


@pytest.fixture
def small_run(tmp_path):
    """A run file beside its data and model, with a reward function in a file.

    While there is a file ``hold``, its sixth call waits: however slow the test is, the run has not ended by then.
    """
    tiny.causal_lm(sharpness=1.0).save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    rows = [{"prompt": prompt.content} for prompt in tiny.prompts([4, 5, 6, 7] * 4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "import time\nfrom pathlib import Path\n\ncalls, hold = [], Path(__file__).with_name('hold')\n\n\n"
        "def words(completions):\n    calls.append(1)\n"
        "    while len(calls) > 5 and hold.exists():\n        time.sleep(0.01)\n"
        "    return [float(len(set(c.split()))) for c in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: policy\ndataset_name: prompts.jsonl\nreward_funcs: [rewards.py:words]\n"
        f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nmax_steps: 40\nmax_new_tokens: 8\nmax_length: 64\n"
        "per_device_train_batch_size: 4\nlogging_steps: 1\nlearning_rate: 1.0e-3\nsave_strategy: 'no'\n"
        "report_to: none\n"
    )
    return tmp_path / "run.yaml"


def test_a_reward_that_fails_costs_no_step(small_run, tmp_path):
    """In each process, the fourth call fails."""
    (tmp_path / "rewards.py").write_text(
        "calls = []\n\n\ndef words(completions):\n    calls.append(1)\n    if len(calls) == 4:\n"
        "        raise ConnectionError('away')\n    return [float(len(set(c.split()))) for c in completions]\n"
    )
    failed = online_dpo("train", small_run, "--max_steps", 6)
    assert failed.returncode == 1 and "error: Reward function `words` raised ConnectionError: away" in failed.stderr
    [command] = re.findall(r"Before that: .*checkpoint-3. Resume with: online-dpo (.*)", failed.stderr)
    resumed = online_dpo(*shlex.split(command))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "step 6/6" in resumed.stdout and "step 3/6" not in resumed.stdout


def test_ctrl_c_saves_and_the_printed_command_resumes_to_the_same_end(small_run, tmp_path):
    steps = ("--max_steps", "12")
    whole = online_dpo("train", small_run, *steps, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    (tmp_path / "hold").touch()
    run = subprocess.Popen(
        [sys.executable, "-m", "online_dpo", "train", str(small_run), *steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    for line in run.stdout:
        if line.startswith("step 3/"):
            break
    run.send_signal(signal.SIGINT)
    (tmp_path / "hold").unlink()
    _, errors = run.communicate(timeout=420)
    assert run.returncode == 130, errors
    [command] = re.findall(r"Resume with: online-dpo (.*)", errors)
    resumed = online_dpo(*command.split())
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "step 12/12" in resumed.stdout and "step 2/12" not in resumed.stdout
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_a_run_that_is_killed_asks_its_judge_nothing_twice(small_run, tmp_path):
    """And ends as the uninterrupted run. What was on its way when the run was killed is not counted."""
    held_from, killed = 10**9, threading.Event()

    def more_different_words(body, number):
        if number >= held_from:  # a run that goes on until this test has been told of its tenth step would end
            killed.wait()
        first, second = (len(set(text.split())) for text in shown(body))
        return says("A", 0.8) if first > second else says("B", 0.3)

    def train(endpoint, name, *words):
        judge = {"model": "m", "base_url": endpoint.url, "cache": str(tmp_path / f"{name}.sqlite3")}
        command = [sys.executable, "-m", "online_dpo", "train", small_run, "--output_dir", tmp_path / name]
        command += ["--judge_kwargs", json.dumps(judge), *words]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)

    text = small_run.read_text().replace("reward_funcs: [rewards.py:words]", "judge: llm\nnum_completions: 3")
    small_run.write_text(text.replace("save_strategy: 'no'", "save_steps: 4").replace("max_steps: 40", "max_steps: 14"))
    with serving(more_different_words) as endpoint:
        assert train(endpoint, "whole").wait(timeout=420) == 0
        asked = len(endpoint.seen)
    held_from = int(0.85 * asked)
    with serving(more_different_words) as endpoint:
        run = train(endpoint, "killed")
        for line in run.stdout:
            if line.startswith("step 10/"):
                break
        run.kill()
        run.wait()
        killed.set()
        with closing(sqlite3.connect(tmp_path / "killed.sqlite3")) as cache:
            kept = cache.execute("SELECT count(*) FROM answers").fetchone()[0]
        time.sleep(0.5)  # for a question that the operating system still holds
        before = len(endpoint.seen)
        assert asked / 2 < before < asked and before / 2 < kept <= before
        resumed = train(endpoint, "killed", "--resume_from_checkpoint", tmp_path / "killed" / "checkpoint-4")
        output, _ = resumed.communicate(timeout=420)
        assert resumed.returncode == 0 and "step 14/14" in output and "step 4/14" not in output
        counts = Counter(request.body["messages"][0]["content"] for request in endpoint.seen)
        assert len(counts) == asked and counts.total() - asked <= before - kept
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


def test_wrong_input_is_one_clear_line_and_costs_no_time(small_run):
    for words, expected in [
        (["--learning_rat", "1"], "learning_rate"),
        (["--temperature", "hot"], "temperature"),
        (["--loss_type", "dpo"], "sigmoid"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
        (["--dataset_name", "./missing.jsonl"], "missing.jsonl"),
        (["--reward_funcs", "rewards.py:absent"], "absent"),
    ]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = online_dpo("train", small_run, *words)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 4, words
    late = online_dpo("train", small_run, "--num_completions", 1)
    assert late.returncode == 2 and "at least 2" in late.stderr and "Traceback" not in late.stderr


def test_a_run_is_stopped_by_its_gold_scorer_and_evaluated_by_it(small_run, tmp_path):
    """The reward likes many different words, gold likes few."""
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("\n\ndef few(completions):\n    return [-float(len(set(c.split()))) for c in completions]\n")
    rows = [{"prompt": prompt.content} for prompt in tiny.prompts([4, 5, 6, 7] * 8, seed=1)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with small_run.open("a") as file:
        file.write("eval_reward_funcs: [rewards.py:few]\neval_dataset_name: held_out.jsonl\neval_strategy: steps\n")
        file.write("eval_steps: 1\neval_on_start: true\noveroptimisation: stop\nmax_grad_norm: 0\n")
    trained = online_dpo("train", small_run, "--learning_rate", 1e-2, "--beta", 0.01)
    assert trained.returncode == 0, trained.stderr[-3000:]
    [step] = re.findall(r"Overoptimisation in `eval` at step (\d+): since step 0,", trained.stderr)
    assert "Training stops here." in trained.stderr and (tmp_path / "out" / f"checkpoint-{step}").is_dir()
    assert int(step) < 40 and f"step {step}/40" in trained.stdout and f"step {int(step) + 1}/40" not in trained.stdout
    assert re.search(r"^eval step 0/40 .* gold -[\d.]+", trained.stdout, flags=re.MULTILINE)

    done = online_dpo("eval", small_run, "--json", tmp_path / "figures.json", "--samples", 4)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["scored_by"] == "few" and result["prompts"] == 32 and not result["trained_on_scorer"]
    assert result["win_rate"]["high"] < 0.5 and result["score"]["difference"]["high"] < 0 and result["kl"]["value"] > 0
    assert f"Win rate {result['win_rate']['value']:.1%}" in done.stdout
