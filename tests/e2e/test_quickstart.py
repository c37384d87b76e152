"""The page of the quickstart, in an empty folder and in its order: `online-dpo quickstart` in full, and what follows.

`make ci` and `make test-wheel` run them from the wheel, in a clean environment without extras, whose Python is in
``INSTALLED_PYTHON``. Without that variable, they run from this environment.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM, AutoTokenizer

import online_dpo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "start" / "quickstart.md").read_text()
WHEEL_PYTHON = os.environ.get("INSTALLED_PYTHON")
PYTHON = Path(WHEEL_PYTHON or sys.executable)
COMMAND = PYTHON.with_name("online-dpo")
LONGEST = 1800  # of a command that hangs: on a machine that is slow and busy, the quickstart takes its time


def run(folder, *command):
    """A command in both cores, as its users run it. A wheel's environment finds nothing of the repository."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    if WHEEL_PYTHON:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=LONGEST)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    started = time.monotonic()
    output = run(folder, COMMAND, "quickstart")
    seconds = time.monotonic() - started
    out = folder / "runs" / "quickstart"
    return out, output, {"took": seconds, **json.loads((out / "summary.json").read_text())}


@pytest.mark.skipif(not WHEEL_PYTHON, reason="without INSTALLED_PYTHON, it runs from this environment: make test-wheel")
def test_the_wheel_is_alone_in_its_environment(tmp_path):
    """Its code comes from that environment, with what it requires and with nothing that an extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    for_users = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    extras = {canonicalize_name(Requirement(line).name) for lines in for_users.values() for line in lines}
    code = (
        "import importlib.metadata as m, json, online_dpo\n"
        "print(json.dumps([online_dpo.__file__, online_dpo.__version__, *(d.name for d in m.distributions())]))"
    )
    file, version, *installed = json.loads(run(tmp_path, PYTHON, "-c", code))
    assert Path(file).is_relative_to(PYTHON.parents[1]) and version == online_dpo.__version__
    installed = {canonicalize_name(name) for name in installed}
    assert {*required, "online-dpo"} - {"nvidia-ml-py"} <= installed  # macOS has none of that
    assert {"peft", "openai", "vllm", "uvicorn", "trl", "ray"} <= extras
    assert installed & (extras - required - {"online-dpo"}) == set()


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


def test_says_how_long_it_took(finished):
    """All but the loading of libraries. On an idle machine of two cores it is under four minutes, as the page says."""
    _, _, summary = finished
    assert 0.5 * summary["took"] < summary["seconds"] <= summary["took"]


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


def words(text):
    """What is said, whatever the figures: how lines are wrapped and a table is drawn depends on their width."""
    return " ".join(re.sub(r"[-+]?\d[\d.:]*(e-?\d+)?%?|[\u2500-\u257f]", " ", text).split())


def test_the_page_shows_what_is_printed(finished):
    """But for figures, lines that are left out, and three answers (they hang on the last bits of weights)."""
    _, output, _ = finished
    [shown] = re.findall(r"```text\n(Loading.*?)```", PAGE, flags=re.DOTALL)
    printed = words("".join(line for line in output.splitlines(keepends=True) if "[WARNING]" not in line))
    begins, goes_on = shown.split("\n...\n")
    trained, answers = goes_on.split("rubric's points:")
    *_, ends = answers.partition(" held-out prompts (95 %")
    assert len(ends) > 1000 and answers.count("\n  before (") == 3
    for part in (begins, trained, ends):
        assert words(part) in printed


def commands(name):
    """Those of the page that begin so, in its order, without their comments."""
    return re.findall(rf"^online-dpo {name} (runs/[^#\n]*[^#\s])", PAGE, flags=re.MULTILINE)


@pytest.mark.slow  # CI runs them with tiny models: tests/docs
def test_the_pages_other_lines_run_behind_it(finished):
    """In three steps; all else as they are written."""
    out, _, _ = finished
    folder = out.parents[1]
    trained = commands("train")
    assert len(trained) == 2 and len(commands("eval")) == 1
    for words in trained:
        output = run(folder, COMMAND, "train", *shlex.split(words), "--max_steps", "3")
        assert "step 3/3" in output and "Model saved in runs/" in output
    for words in commands("eval"):
        assert "Win rate" in run(folder, COMMAND, "eval", *shlex.split(words))


def test_its_record_is_seen_with_the_pages_commands(finished):
    out, output, summary = finished
    folder = out.parents[1]
    assert all(output.count(f"online-dpo dashboard {words}") == 2 for words in commands("dashboard")), output
    assert output.index("online-dpo dashboard") < output.index("Making a tokenizer")
    for name in ("report", "export", "doctor"):
        [words, *_] = commands(name)  # where a command stands twice, it is the same one
        assert run(folder, COMMAND, name, *shlex.split(words))
    page = (out / "report.html").read_text()
    assert f"{summary['win_rate']:.1%}" in page and "summary.json" in page and "finished" in page
    pairs = [json.loads(line) for line in (folder / "runs" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 2500 and all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    assert "](training.svg)" in (out / "README.md").read_text() and (out / "training.svg").is_file()


def test_the_readmes_python_example_runs(finished):
    out, _, _ = finished
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (out / "example.py").write_text(example.replace("max_steps=200", "max_steps=2"))
    run(out.parents[1], PYTHON, out / "example.py")
    assert (out.parent / "polite" / "checkpoint-2" / "model.safetensors").is_file()
