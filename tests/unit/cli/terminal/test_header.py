"""What a run says it is, before anything is loaded."""

import pytest

from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.cli.terminal.header import describe_plan, is_first_process
from support.processes import run_python
from support.run_files import fill_folder, write_run_file

REWARD = "def words(completions, **_):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("run"), REWARD)


def header(folder, **fields):
    path = write_run_file(folder, reward_funcs="feedback.py:words", **fields)
    lines = list(describe_plan(plan_run(path, [])))
    return dict(line.strip().split(maxsplit=1) for line in lines[1:])


def test_every_fact_of_the_run_file(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    facts = header(folder, gradient_accumulation_steps=3, eval_dataset_name="data.jsonl", dataset_limit=1000)
    assert facts == {
        "model": str(folder / "policy"),
        "prompts": f"{folder / 'data.jsonl'} (train), at most 1,000 rows",
        "evaluation": f"{folder / 'data.jsonl'} (train)",
        "feedback": "feedback.py:words",
        "reference": "the model as it is before training",
        "engine": "transformers; 4 completions a prompt, up to 8 tokens",
        "batch": "8 prompts x 3 accumulated x 2 processes = 48 prompts with 192 completions a step",
        "steps": "1",
        "output": str(folder / "out"),
    }


def test_what_is_not_given_is_shown_as_it_will_be(folder, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fields = dict(max_steps=None, num_completions=None, per_device_train_batch_size=None, max_new_tokens=None)
    facts = header(folder, **fields, use_peft=True, num_train_epochs=2, output_dir=None)
    assert facts["batch"] == "8 prompts with 16 completions a step"
    assert facts["engine"] == "transformers; 2 completions a prompt, up to 64 tokens"
    assert facts["epochs"] == "2" and "steps" not in facts and facts["output"] == "trainer_output"
    assert facts["model"].endswith("policy with a LoRA adapter of rank 16")
    assert facts["reference"] == "the model without the adapter"


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False)])
def test_one_process_speaks(rank, first, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() is first


def test_it_stands_there_before_torch_is_loaded(folder):
    path = write_run_file(folder, reward_funcs="feedback.py:words")
    code = (
        "import sys\nfrom pathlib import Path\nfrom online_dpo.cli.terminal.header import describe_plan\n"
        "from online_dpo.cli.runfile.run_file import plan_run\nfrom online_dpo.cli.terminal.screen import print_lines\n"
        f"print_lines(describe_plan(plan_run(Path({str(path)!r}), [])))\nprint('torch' in sys.modules)"
    )
    done = run_python("-c", code, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("online-dpo ") and lines[-1] == "False" and len(lines) == 10
