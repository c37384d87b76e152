"""The examples of docs/project/extending.md, as they stand there: each from outside, by `plugins` and by an import."""

import functools
import math
import re
import sys
from pathlib import Path

import pytest
import yaml

from online_dpo import OnlineDPOTrainer
from support import tiny
from support.plugins import names_restored
from support.run_files import fill_folder, trainer_of, write_run_file
from support.training import config, dataset, word_reward

PAGE = (Path(__file__).parents[2] / "docs" / "project" / "extending.md").read_text()
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.M | re.S)


def examples():
    """For each section its file's name and text, the lines of a run file, and those in Python."""
    for section in PAGE.split("\n## ")[1:]:
        blocks = BLOCK.findall(section)
        if len(blocks) == 3:  # a check of the doctor is used by run files alone, and tested with it
            [(_, file), (_, fields), (_, script)] = blocks
            yield section.splitlines()[0], file.splitlines()[0].removeprefix("# "), file, yaml.safe_load(fields), script


EXAMPLES = {title: example for title, *example in examples()}
VALUES = {
    "A loss": lambda made, log: (log["loss"], math.log(2)),  # policy and reference are the same
    "A pair strategy": lambda made, log: (log["pairs/count"] + log.get("dropped/tie", 0), log["prompts"]),
    "A reward": lambda made, log: (log["scores/vowels"], log["objective/scores"]),
    "A judge": lambda made, log: (log["pairs/probability"], 0.9),
    "An engine": lambda made, log: (type(made.sampler.engine).__name__, "Timed"),
    "A method": lambda made, log: (log["loss"], math.log(2) * (1 - log["opponent/win_rate"])),
    "A metric": lambda made, log: (log["mine/longest"] >= log["completions/mean_length"], True),
}


@pytest.fixture(autouse=True)
def free_names():
    with names_restored():
        yield


def first_log(made):
    made.train()
    return next(log for log in made.state.log_history if "prompts" in log)


def test_there_is_an_example_of_every_kind():
    assert list(EXAMPLES) == list(VALUES)
    assert all(name in fields["plugins"] for name, _, fields, _ in EXAMPLES.values())


@pytest.mark.parametrize("title", VALUES)
def test_a_run_file(title, tmp_path, capsys):
    name, text, fields, _ = EXAMPLES[title]
    fill_folder(tmp_path, "def words(completions, **_):\n    return [float(len(set(text))) for text in completions]\n")
    (tmp_path / name).write_text(text)
    rewards = {} if "judge" in fields else {"reward_funcs": "feedback.py:words"}
    made = trainer_of(write_run_file(tmp_path, **{**rewards, "max_steps": 2, **fields}))
    got, wanted = VALUES[title](made, first_log(made))
    assert got == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted)
    assert title != "An engine" or capsys.readouterr().out.count("8 prompts: ") == 2


@pytest.mark.parametrize("title", VALUES)
def test_python(title, tmp_path, monkeypatch):
    name, text, _, script = EXAMPLES[title]
    (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny.causal_lm(sharpness=1.0), "dataset": dataset(), "tokenizer": tiny.tokenizer()}
    names = {**given, "OnlineDPOConfig": functools.partial(small, tmp_path), "OnlineDPOTrainer": OnlineDPOTrainer}
    exec(script, names)
    made = names.get("trainer") or OnlineDPOTrainer(
        model=given["model"],
        reward_funcs=word_reward,
        args=names["args"],
        train_dataset=given["dataset"],
        processing_class=given["tokenizer"],
    )
    got, wanted = VALUES[title](made, first_log(made))
    assert got == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted)


def small(tmp_path, output_dir, **fields):
    return config(tmp_path / output_dir, max_steps=2, **fields)
