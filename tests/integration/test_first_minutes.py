"""What a user sees of a run: displays, resumed runs, prompts that were cut."""

import logging

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from online_dpo import ProgressDisplay
from online_dpo.cli.terminal.summary import describe_trainer
from online_dpo.errors import CheckpointError
from online_dpo.training.interrupt import Interrupt
from support import tiny, training


@pytest.mark.smoke
def test_the_display_of_a_user_takes_the_place_of_transformers_own(tmp_path, capsys):
    class Own(TrainerCallback):
        pass

    made = training.trainer(tmp_path, max_steps=2, kwargs={"callbacks": [ProgressDisplay(), Own()]}, disable_tqdm=False)
    made.train()
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["step 1/2", "step 2/2"] and lines[2].startswith("Trained 2")
    assert not any("{" in line for line in lines) and "2/2 [" not in shown.err
    kinds = [type(callback).__name__ for callback in made.callback_handler.callbacks]
    assert "ProgressCallback" not in kinds and "Own" in kinds and Interrupt.__name__ in kinds


def test_a_tied_weight_is_not_missing_from_a_checkpoint_and_a_lost_one_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    training.trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    resumed = training.trainer(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"checkpoint-1.*model\.safetensors"):
        training.trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(file.parent))
    (file.parent / "manifest.json").unlink()  # as an earlier version left it
    training.trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(file.parent))
    assert "missing keys in the checkpoint model loaded: ['model.norm.weight']" in caplog.text


def test_a_finished_run_that_is_resumed_says_that_it_was_over(tmp_path, caplog):
    training.trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    training.trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    assert "This run was over: step 1 of 1 is done. Nothing more is trained" in caplog.text


def test_cut_prompts_of_a_stream_are_counted_and_told_once(tmp_path, caplog):
    data = training.dataset((5, 60, 61, 3)).to_iterable_dataset()
    made = training.trainer(
        tmp_path, train_dataset=data, max_steps=2, kwargs={"eval_dataset": training.dataset((60, 3))}
    )
    made.train()
    assert [log["prompts/cut"] for log in made.state.log_history if "prompts" in log] == [2, 2]
    assert made.evaluate()["eval_prompts/cut"] == 1
    told = [record.getMessage() for record in caplog.records if "cut on the left" in record.getMessage()]
    assert [message.partition(", which")[0] for message in told] == [
        "eval_dataset: 1 of 2 prompts are longer than 56 tokens",
        "train_dataset, since the last log: 2 of 4 prompts are longer than 56 tokens",
    ]


def test_the_loaded_models_and_prompts_are_described(tmp_path):
    model = tiny.causal_lm(sharpness=1.0)
    model.model.embed_tokens.weight.requires_grad_(False)
    total, frozen = sum(p.numel() for p in model.parameters()), model.model.embed_tokens.weight.numel()
    made = training.trainer(tmp_path, model=model, train_dataset=training.dataset((60, 3)), max_steps=3)
    assert list(describe_trainer(made)) == [
        f"  parameters  {total:,}, {total - frozen:,} ({1 - frozen / total:.2%}) trained; float32 on cpu",
        "  prompts     2, 1 of them cut, gone through 6 times",
        "  reference   a frozen copy of the policy",
    ]
