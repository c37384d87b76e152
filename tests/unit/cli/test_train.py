"""The command line: what it says, and how fast it says it."""

from __future__ import annotations

import re
import resource
import subprocess
import warnings
from pathlib import Path

import pytest

import online_dpo
from online_dpo.cli.main import main
from online_dpo.cli.runfile.help import GROUPS, USUAL
from online_dpo.cli.runfile.schema import PARENT, load_fields
from online_dpo.cli.terminal.progress import plain_warnings
from online_dpo.config.trainer_config import OnlineDPOConfig
from support.plans import GOOD, write
from support.processes import run_python

FIELDS = load_fields()


def command(*words: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """What it said, and the seconds that a processor had to do with it: a busy machine may take longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-m", "online_dpo", *words, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_within_a_second() -> None:
    done, seconds = command("--help")
    assert done.returncode == 0
    assert "quickstart" in done.stdout and "train" in done.stdout
    assert seconds < 2


def test_help_of_train_shows_every_field() -> None:
    done, seconds = command("train", "--help-all")
    assert done.returncode == 0
    shown = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert shown >= {f"--{name}" for name in FIELDS}
    assert "  --beta  (list[float]; default [0.1])\n      Strength of the pull" in done.stdout
    assert seconds < 2


def test_help_of_train_is_a_screen_or_two_with_all_fields_of_ours_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70 and max(map(len, text.splitlines())) <= 120
    groups = {line.partition(":")[0]: names.split() for line, names in _headed(text)}
    ours = {spec.name for spec in FIELDS.values() if spec.group != PARENT}
    assert ours == {name for group in GROUPS for name in groups[group]}
    assert {"beta", "loss_type"} <= set(groups["loss"]) and "lora_r" in groups["adapters"]
    parent = sum(spec.group == PARENT for spec in FIELDS.values())
    assert f"of transformers.TrainingArguments (and {parent - len(USUAL)} more, see --help-all)" in text
    assert set(USUAL) <= set(FIELDS) - ours


def _headed(text: str) -> list[tuple[str, str]]:
    blocks = re.split(r"\n(?=\S)", text)
    return [(block.partition("\n")[0], block.partition("\n")[2]) for block in blocks]


@pytest.mark.parametrize(
    ("topic", "begins", "holds"),
    [
        ("beta", "  --beta  (list[float]; default [0.1])", ""),
        ("pairs", "  --pair_selection  (str; default 'best_worst')", "--tie_policy"),
        ("Reward", "  --reward_funcs", "`reward` is also mentioned in the text of"),
        ("lr-scheduler-type", "  --lr_scheduler_type", ""),
    ],
)
def test_help_with_a_topic(capsys: pytest.CaptureFixture[str], topic: str, begins: str, holds: str) -> None:
    for words in (["--help", topic], ["run.yaml", "-h", topic]):
        assert main(["train", *words]) == 0
        text = capsys.readouterr().out
        assert text.startswith(begins) and holds in text


def test_version() -> None:
    done, _ = command("--version")
    assert done.stdout == f"online-dpo {online_dpo.__version__}\n"


def test_a_bad_run_file_is_refused_within_two_seconds(folder: Path) -> None:
    write(folder / "run.yaml", {**GOOD, "learning_rat": 1, "max_steps": "ten"})
    done, seconds = command("train", "run.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: run.yaml:5: `learning_rat` is not a field. Did you mean `learning_rate`?\n"
        "error: run.yaml:6: `max_steps` is 'ten'; wanted: a whole number.\n"
    )
    assert seconds < 4


def test_a_missing_run_file_and_none_at_all(folder: Path) -> None:
    done, _ = command("train", "run.yaml", cwd=folder)
    assert (done.returncode, done.stderr) == (2, "error: run.yaml: there is no such file.\n")
    done, _ = command("train", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: online-dpo train [run.yaml]")


def test_importing_the_package_loads_no_torch() -> None:
    imports = "import sys, online_dpo, online_dpo.cli.runfile.run_file"
    code = f"{imports}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run_python("-c", code).stdout == "False False\n"
    assert online_dpo.OnlineDPOConfig is OnlineDPOConfig
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = online_dpo.Nothing


def test_the_command_that_resumes_keeps_the_other_words() -> None:
    from online_dpo.cli.train import resume_words  # loads the trainer

    words = ["run.yaml", "--resume-from-checkpoint", "old", "--beta", "0.1", "0.2", "--resume_from_checkpoint=older"]
    assert resume_words(words, "new") == ["run.yaml", "--beta", "0.1", "0.2", "--resume_from_checkpoint", "new"]


def test_warnings_are_one_line_without_a_place_in_the_code() -> None:
    usual = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("Ignored without\n  a reward: x.", UserWarning, "train.py", 86) == (
            "warning: Ignored without a reward: x.\n"
        )
        assert "library.py:7: DeprecationWarning: old" in warnings.formatwarning(
            "old", DeprecationWarning, "library.py", 7, line=""
        )
    assert warnings.formatwarning is usual
