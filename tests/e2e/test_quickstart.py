"""`online-dpo quickstart` in full: the figures that the README promises."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "online_dpo", "quickstart", "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=590)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout, json.loads((out / "summary.json").read_text())


def test_wins_by_the_rubric(finished):
    _, _, summary = finished
    low, high = summary["win_rate_ci95"]
    assert summary["win_rate"] >= 0.85 and low > 0.8 and high > summary["win_rate"]
    assert summary["gold_after"] > summary["gold_before"] and summary["proxy_after"] > summary["proxy_before"]
    assert 0 < summary["kl"] < 12 and summary["steps"] > 0 and summary["tokens_per_second"] > 0


def test_right_answers_rise(finished):
    _, _, summary = finished
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.1
    assert summary["accuracy_after_ci95"][0] > summary["accuracy_before_ci95"][1]
    assert summary["greedy_accuracy_after"] >= summary["greedy_accuracy_before"] > 0.8
    assert summary["reward_model_accuracy"] > 0.93


def test_takes_less_than_four_minutes(finished):
    _, _, summary = finished
    assert summary["seconds"] < 240


def test_prints_samples_and_a_table(finished):
    _, output, summary = finished
    assert output.count("before (") == 3 and output.count("after  (") == 3
    assert f"{summary['gold_after']:.2f}" in output and f"{summary['win_rate']:.1%}" in output
    assert f"{summary['accuracy_before']:.1%}" in output and f"{summary['greedy_accuracy_after']:.1%}" in output


def test_leaves_an_ordinary_model_folder(finished):
    out, _, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("User: What is 3 plus 2?\nAssistant:", return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert len(tokenizer.decode(reply[0], skip_special_tokens=True)) > 45
    assert "online-dpo" in (out / "README.md").read_text()
