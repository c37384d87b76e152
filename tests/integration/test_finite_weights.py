"""Weights become NaN although each step's gradient was finite: they are never saved, and the run says so."""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from online_dpo.errors import ForeignCodeError, TrainingDivergedError
from support import tiny
from support.training import LORA, trainer, weights

EVERY_STEP = dict(save_strategy="steps", save_steps=1, max_steps=4)


class Spoils(TrainerCallback):
    """Writes NaN into one weight at the end of a step."""

    def __init__(self, step, name="norm.weight", event="on_step_end"):
        self.step, self.name = step, name
        setattr(self, event, self.spoil)

    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            name, weight = next((n, p) for n, p in model.named_parameters() if self.name in n)
            weight.data.view(-1)[1] = math.nan


def diverged(made):
    with pytest.raises(TrainingDivergedError) as caught:
        made.train()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved_steps(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def finite_on_disk(folder):
    files = [*folder.rglob("*.safetensors")]
    return all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


def test_a_callback_that_writes_nan_is_found_before_the_next_save(tmp_path):
    message = diverged(trainer(tmp_path, kwargs={"callbacks": [Spoils(3)]}, **EVERY_STEP))
    assert "norm.weight` of the policy holds 1 of" in message
    assert message.startswith("Before a save, after step 3, the weights are not finite")
    assert f"The last finite weights are in {tmp_path}/checkpoint-2." in message
    assert saved_steps(tmp_path) == ["checkpoint-1", "checkpoint-2"] and finite_on_disk(tmp_path)


def test_without_checkpoints_it_is_found_at_the_first_skipped_step_or_at_the_end(tmp_path):
    message = diverged(trainer(tmp_path, kwargs={"callbacks": [Spoils(2)]}, max_steps=9, tie_policy="first"))
    assert message.startswith("In a step that was skipped, after step 2, ") and "No checkpoint has" in message
    message = diverged(trainer(tmp_path, kwargs={"callbacks": [Spoils(2)]}, max_steps=2))
    assert message.startswith("At the end, after step 2, ")
    message = diverged(trainer(tmp_path, kwargs={"callbacks": [Spoils(2, event="on_train_end")]}, max_steps=2))
    assert message.startswith("At the end, after step 2, ")
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("fields", [dict(adam_epsilon=0.0), dict(adam_epsilon=0.0, optim="adamw_torch_fused")])
def test_an_update_that_divides_by_zero(tmp_path, fields):
    """Rows of the embeddings that no step reads have a gradient of 0, and Adam's quotient is 0 / 0."""
    model = tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False)
    message = diverged(trainer(tmp_path, model=model, max_grad_norm=1.0, **{**EVERY_STEP, **fields}))
    assert "after step 1" in message and "embed_tokens.weight" in message
    assert saved_steps(tmp_path) == []


def test_an_update_beyond_the_range_of_half_precision(tmp_path):
    model = tiny.causal_lm(sharpness=1.0).to(torch.float16)
    model.lm_head.weight.data[3, 3] = 8.0  # weight decay makes it 8 * (1 - 9900)
    message = diverged(trainer(tmp_path, model=model, **{**EVERY_STEP, "learning_rate": 100, "weight_decay": 99}))
    assert "NaN or infinite" in message and finite_on_disk(tmp_path)


def test_an_adapter_and_a_module_beside_it(tmp_path):
    from peft import LoraConfig

    for name in ("lora_B", "modules_to_save"):
        kwargs = {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"]), "callbacks": [Spoils(2, name)]}
        message = diverged(trainer(tmp_path / name, kwargs=kwargs, **EVERY_STEP))
        assert f"{name}" in message and f"{tmp_path}/{name}/checkpoint-1." in message


def test_a_reference_that_follows_the_policy(tmp_path):
    class SpoilsReference(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                made.reference.model.lm_head.weight.data.fill_(math.inf)

    fields = {**EVERY_STEP, "sync_ref_model": True, "ref_model_sync_steps": 100}
    made = trainer(tmp_path, kwargs={"callbacks": [SpoilsReference()]}, **fields)
    assert "of the reference holds" in diverged(made)
    assert saved_steps(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_weights_that_are_not_finite_at_the_start(tmp_path, which):
    spoiled = tiny.causal_lm(sharpness=1.0)
    spoiled.model.norm.weight.data[0] = math.nan
    kwargs = {"ref_model": spoiled} if which == "reference" else {}
    made = trainer(tmp_path, model=None if which == "reference" else spoiled, kwargs=kwargs, **EVERY_STEP)
    with pytest.raises(ValueError, match=f"start from are not finite: `model.norm.weight` of the {which} holds 1 of"):
        made.train()
    assert made.state.global_step == 0 and saved_steps(tmp_path) == []


def test_a_model_is_not_saved_by_hand_either(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.save_model()
    before = weights(made.model)
    made.model.lm_head.weight.data[0] = math.inf
    with pytest.raises(TrainingDivergedError, match=r"Before a save, after step 1.*`lm_head.weight`|embed_tokens"):
        made.save_model()
    assert finite_on_disk(tmp_path) and len(load_file(tmp_path / "model.safetensors")) <= len(before)


def test_an_error_that_nan_weights_caused_is_told_as_that(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("who knows why")

    callbacks = [Spoils(2), Fails()]
    with pytest.raises(ForeignCodeError, match="who knows why"):
        trainer(tmp_path, kwargs={"callbacks": callbacks}, max_steps=4).train()
    assert saved_steps(tmp_path) == []


def test_steps_that_are_not_finite_leave_the_weights_before_them_on_the_disk(tmp_path):
    """What the message promises is read back, also where the folder is rotated and its checkpoints are few."""
    count = [0]

    def poison(module, args, output):
        count[0] += module.training
        return (output[0] * math.nan, output[1]) if module.training and count[0] > 2 else None

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(poison)
    made = trainer(tmp_path, model=model, **{**EVERY_STEP, "max_steps": 9}, max_skipped_steps=3, save_total_limit=1)
    message = diverged(made)
    assert re.search(rf"3 steps in a row .* before them are in {tmp_path}/checkpoint-5\.", message)
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    now = weights(made.model)
    assert all(torch.equal(saved[name], now[name]) for name in saved) and finite_on_disk(tmp_path)


def test_a_schedule_that_gives_nan_makes_no_step(tmp_path):
    class Sets(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 2:
                optimizer.param_groups[0]["lr"] = math.nan

    made = trainer(tmp_path, kwargs={"callbacks": [Sets()]}, max_steps=4)
    message = diverged(made)
    assert message.startswith("The learning rate of step 3 is nan")
    assert saved_steps(tmp_path) == ["checkpoint-2"] and finite_on_disk(tmp_path)
    assert all(weight.isfinite().all() for weight in made.model.parameters())


def test_a_metric_that_is_nan_is_never_the_best(tmp_path):
    from support.training import dataset

    values = iter([math.nan, 0.5, math.nan, 0.1])
    made = trainer(
        tmp_path,
        **EVERY_STEP,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="own",
        greater_is_better=True,
        kwargs={"eval_dataset": dataset(lengths=(3, 4)), "compute_metrics": lambda _: {"own": next(values)}},
    )
    made.train()
    assert (made.state.best_global_step, made.state.best_metric) == (2, 0.5)
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(best[name], weights(made.model)[name]) for name in best)
