"""A checkpoint knows its run: what computes something else is refused by name, before anything is trained."""

import json
import logging
from functools import wraps

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from online_dpo.errors import CheckpointError, OnlineDPOError
from support import tiny
from support.training import LORA, dataset, trainer, weights, word_reward

OPTIONS = dict(max_steps=2, save_strategy="steps", save_steps=1, max_staleness=1, overwrite_output_dir=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, **OPTIONS).train()
    return folder


def resumes(folder, model=None, kwargs=None, **options):
    made = trainer(folder, model=model, kwargs=kwargs, **{**OPTIONS, "save_strategy": "no", **options})
    made.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return made


def other_reward(completions, **_):
    return word_reward(completions)


def reward_model(seed):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(tiny.config("llama", num_labels=1)).eval()


def other_rows():
    rows = dataset().to_list()
    rows[7]["name"] = "row seven"
    return Dataset.from_list(rows)


def other_tokenizer():
    made = tiny.tokenizer()
    made.chat_template = "{{ messages }}"
    return made


CHANGES = {
    "seed": (dict(seed=1), "seed: checkpoint has 42, this run has 1"),
    "K": (dict(num_completions=3), "num_completions: checkpoint has 2, this run has 3"),
    "batch": (dict(per_device_train_batch_size=2), "accumulation_steps x processes: checkpoint has 4, this run has 2"),
    "learning rate": (dict(learning_rate=1e-4), "learning_rate: checkpoint has 0.001, this run has 0.0001"),
    "schedule": (dict(lr_scheduler_type="linear"), "lr_scheduler_type: checkpoint has constant, this run has linear"),
    "beta by epochs": (dict(beta=[0.1, 0.2]), r"beta: checkpoint has 0.1, this run has \[0.1, 0.2\]"),
    "an option that needs a file": (dict(target_kl=1.0), "beta.json is missing"),
    "no step ahead": (dict(max_staleness=0), "max_staleness: checkpoint has 1, this run has 0"),
    "data": (lambda: dict(train_dataset=other_rows()), r"train_dataset: checkpoint has 12 rows, \w+, this run has 12"),
    "fewer rows": (lambda: dict(train_dataset=dataset([5, 9, 3, 7])), "12 rows, .* this run has 4 rows, "),
    "reward": (dict(reward_funcs=other_reward), 'reward_funcs: checkpoint has .*word_reward"], this run has .*other'),
    "model": (
        lambda: dict(model=tiny.causal_lm(seed=1, sharpness=1.0)),
        r"model: checkpoint has LlamaForCausalLM, weights \w+, this run has LlamaForCausalLM, weights ",
    ),
    "reference": (
        lambda: dict(kwargs={"ref_model": tiny.causal_lm(seed=1, sharpness=1.0)}),
        "ref_model: checkpoint has made of the policy, this run has LlamaForCausalLM, weights ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_computes_something_else_is_refused(folder, name):
    options, message = CHANGES[name]
    made = trainer(folder, **{**OPTIONS, **(options() if callable(options) else options)})
    before = weights(made.model)
    with pytest.raises(CheckpointError, match=message) as caught:
        made.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert made.state.global_step == 0 and all(torch.equal(p, before[n]) for n, p in weights(made.model).items())


def test_several_differences_are_told_together_with_the_two_ways_on(folder):
    with pytest.raises(CheckpointError) as caught:
        resumes(folder, seed=1, temperature=0.5)
    assert str(caught.value) == (
        f"{folder}/checkpoint-1 is of a run that computes something else: seed: checkpoint has 42, this run has 1; "
        "temperature: checkpoint has 0.9, this run has 0.5. Put this back as it was, or go on from it all the same "
        "with `resume_anyway: true` (`--resume_anyway`, `resume_anyway=True`)."
    )


def test_resume_anyway_goes_on_and_says_what_differs(folder, caplog):
    options = dict(seed=1, learning_rate=1e-4, target_kl=1.0)
    made = resumes(folder, resume_anyway=True, **options)
    assert made.state.global_step == 2 and made.optimizer.param_groups[0]["lr"] == 1e-3
    assert "seed: checkpoint has 42, this run has 1; " in caplog.text
    assert "The optimizer's state in it decides learning_rate." in caplog.text
    assert "checkpoint-1 lacks beta.json: what it would say starts anew" in caplog.text


NOTHING_ELSE = {
    "files and logs": dict(logging_steps=5, save_total_limit=1, save_steps=3),
    "memory": dict(rollout_batch_size=1, max_tokens_per_pass=64, gradient_checkpointing=True),
    "a longer run": dict(max_steps=3),
    "evaluations": dict(eval_strategy="steps", eval_steps=1, kwargs={"eval_dataset": dataset([3, 4])}),
}


@pytest.mark.parametrize("name", NOTHING_ELSE)
def test_what_changes_nothing_of_what_is_computed_is_no_other_run(folder, name, caplog):
    made = resumes(folder, **NOTHING_ELSE[name])
    assert made.state.global_step == NOTHING_ELSE[name].get("max_steps", 2)
    assert "differs" not in caplog.text


def test_a_reward_model_is_known_by_its_weights(tmp_path):
    kwargs = {"reward_processing_classes": tiny.tokenizer()}
    trainer(tmp_path, reward_funcs=reward_model(0), kwargs=kwargs, **OPTIONS).train()
    trainer(tmp_path, reward_funcs=reward_model(0), kwargs=kwargs, **OPTIONS).train(resume_from_checkpoint=True)
    other = trainer(tmp_path, reward_funcs=reward_model(1), kwargs=kwargs, **OPTIONS)
    with pytest.raises(
        CheckpointError, match=r"reward_funcs\.0\.Llama\w+\.weights: checkpoint has Llama\w+, weights \w+, this"
    ):
        other.train(resume_from_checkpoint=True)


def test_an_adapter_is_known_by_its_options_and_its_base(tmp_path):
    def made(rank=4, seed=0):
        config = LoraConfig(**{**LORA, "r": rank})
        return trainer(
            tmp_path, model=tiny.causal_lm(seed=seed, sharpness=1.0), kwargs={"peft_config": config}, **OPTIONS
        )

    made().train()
    made().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"peft_config\.r: checkpoint has 4, this run has 8"):
        made(rank=8).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="model: checkpoint has PeftModelForCausalLM, weights "):
        made(seed=1).train(resume_from_checkpoint=True)


def test_a_tokenizer_is_known_by_its_template(folder):
    made = trainer(folder, **OPTIONS)
    made.checkpoints.identity.add(processing_class={"chat_template": "0123"})
    with pytest.raises(CheckpointError, match="processing_class.chat_template: checkpoint has null, this run has 0123"):
        made.train(resume_from_checkpoint=True)


def test_a_mended_reward_function_of_the_same_name_is_the_same_run(folder):
    @wraps(word_reward)
    def mended(completions, **_):
        return [2 * score for score in word_reward(completions)]

    assert resumes(folder, reward_funcs=mended).state.global_step == 2


def test_other_versions_are_a_warning(folder, caplog, monkeypatch):
    made = trainer(folder, **{**OPTIONS, "save_strategy": "no"})
    made.checkpoints.identity._versions = {"torch": "1.0"}
    made.train(resume_from_checkpoint=True)
    assert "was computed with other versions, so results may differ: torch: checkpoint has 2." in caplog.text


def test_a_checkpoint_that_does_not_know_its_run_is_a_warning(tmp_path, caplog):
    trainer(tmp_path, **OPTIONS).train()
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    made = resumes(tmp_path)
    assert made.state.global_step == 2
    assert "checkpoint-1 does not say what its run computed with, so nothing could be compared" in caplog.text


# --- a folder that is taken -----------------------------------------------------------------------------------------


def test_a_run_does_not_start_among_the_checkpoints_of_another(tmp_path):
    trainer(tmp_path, **OPTIONS).train()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path, **OPTIONS, seed=1).train()
    assert str(caught.value) == (
        f"{tmp_path} holds checkpoint-1 to checkpoint-2 of another run (seed: checkpoint has 42, this run has 1). To "
        "go on from there, resume "
        "(`--resume_from_checkpoint`, `trainer.train(resume_from_checkpoint=True)`); to start anew, give another "
        "`output_dir`, or `overwrite_output_dir: true`, which deletes these checkpoints."
    )
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_that_is_over_may_be_repeated(tmp_path, caplog):
    """The commands of the README are run twice by many."""
    trainer(tmp_path, **OPTIONS).train()
    again = trainer(tmp_path, **OPTIONS)
    again.train()
    assert again.state.global_step == 2
    assert "of an earlier run with the same settings, which is over: this one starts anew" in caplog.text
    ids = {json.loads((p / "manifest.json").read_text())["extra"]["run"]["id"] for p in tmp_path.glob("checkpoint-*")}
    assert len(ids) == 1


def test_a_run_that_is_not_over_is_not_begun_again_by_mistake(tmp_path):
    def fails(completions, trainer_state, **_):
        if trainer_state.global_step == 1:
            raise ConnectionError("away")
        return word_reward(completions)

    for message in (None, "holds checkpoint-1 of a run with these settings that is not over. To go on from there, re"):
        with pytest.raises(OnlineDPOError, match=message):
            trainer(tmp_path, reward_funcs=fails, **{**OPTIONS, "max_staleness": 0}).train()


def test_checkpoints_of_other_programs_are_not_mixed_with_a_runs_own(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(CheckpointError, match=r"holds checkpoint-7 of another run\. To go on from there, resume"):
        trainer(tmp_path, **OPTIONS).train()


def test_overwriting_deletes_the_checkpoints_of_the_other_run(tmp_path):
    trainer(tmp_path, **{**OPTIONS, "max_steps": 3}).train()
    trainer(tmp_path, seed=1, **{**OPTIONS, "max_steps": 1, "overwrite_output_dir": True}).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    options = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["extra"]["run"]["options"]
    assert options["seed"] == 1


def test_a_trainer_trains_twice(tmp_path, caplog):
    """As in a notebook: the second time from the weights of the first, into the same folder."""
    made = trainer(tmp_path, **OPTIONS)
    made.train()
    first = weights(made.model)
    made.train()
    assert any(not torch.equal(p, first[n]) for n, p in weights(made.model).items())
    made.args.max_steps = 3
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "run" in record.message]


def test_a_run_that_was_resumed_is_the_same_run(tmp_path):
    trainer(tmp_path, **OPTIONS).train()
    resumed = trainer(tmp_path, **{**OPTIONS, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    ids = {
        json.loads((path / "manifest.json").read_text())["extra"]["run"]["id"] for path in tmp_path.glob("checkpoint-*")
    }
    assert len(ids) == 1 and len(list(tmp_path.glob("checkpoint-*"))) == 4
