"""What `transformers.Trainer` does in the methods that are overridden here is done, or refused by name."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    TrainerCallback,
)

from online_dpo.packing.prefix_tree import PADDING
from support import tiny
from support.training import assert_same, config, dataset, gradient, trainer, weights

PROMPTS = dataset((4, 6, 3, 5, 2))


# options that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(neftune_noise_alpha=5.0), "neftune_noise_alpha"),
        (dict(use_liger_kernel=True), "use_liger_kernel"),
        (dict(optim="lomo"), "during the backward pass"),
        (dict(optim="galore_adamw_layerwise", optim_target_modules=["attn"]), "during the backward pass"),
        (dict(train_sampling_strategy="group_by_length"), "train_sampling_strategy"),
        (dict(bf16_full_eval=True), "bf16_full_eval"),
        (dict(average_tokens_across_devices=False), "average_tokens_across_devices"),
        (dict(label_names=["labels"]), "label_names"),
        (dict(accelerator_config={"split_batches": True}), "split_batches"),
        (dict(accelerator_config={"dispatch_batches": True}), "dispatch_batches"),
        (dict(accelerator_config={"even_batches": False}), "even_batches"),
    ],
)
def test_options_without_a_meaning_here_are_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


# evaluation ---------------------------------------------------------------------------------------------------------


def evaluated(tmp_path, call=lambda made: made.evaluate(), compute=None, **fields):
    seen = []

    def compute_metrics(prediction, **options):
        seen.append((prediction, options))
        return compute(prediction) if compute else {"count": np.float32(len(prediction.label_ids))}

    kwargs = {"eval_dataset": PROMPTS, "compute_metrics": compute_metrics}
    options = dict(num_completions=3, per_device_eval_batch_size=2, max_new_tokens=4) | fields
    made = trainer(tmp_path, kwargs=kwargs, **options)
    return call(made), seen, made


def test_metrics_receive_inputs_and_losses_and_give_plain_numbers(tmp_path):
    metrics, [(seen, _)], made = evaluated(tmp_path, include_for_metrics=["inputs", "loss"])
    lengths = (seen.inputs != -100).sum(axis=1).tolist()
    assert lengths == [4, 6, 3, 5, 2] and seen.inputs.shape == (5, 6)
    assert seen.predictions.shape == (5, 3) and seen.label_ids.shape == (5,)
    assert np.nanmean(seen.losses) == pytest.approx(metrics["eval_loss"])
    assert type(metrics["eval_count"]) is float and metrics["eval_count"] == 5
    _, [(plain, _)], _ = evaluated(tmp_path)
    assert plain.inputs is None and plain.losses is None


def test_metrics_that_have_their_prefix_keep_it(tmp_path):
    metrics, *_ = evaluated(tmp_path, compute=lambda prediction: {"eval_mine": 1.0, "other": 2.0})
    assert (metrics["eval_mine"], metrics["eval_other"]) == (1.0, 2.0) and "eval_eval_mine" not in metrics


def test_metrics_by_batch(tmp_path):
    calls = []

    def compute_metrics(prediction, compute_result):
        calls.append((len(prediction.label_ids), compute_result))
        return {"batches": len(calls)}

    kwargs = {"eval_dataset": PROMPTS, "compute_metrics": compute_metrics}
    made = trainer(tmp_path, kwargs=kwargs, batch_eval_metrics=True, per_device_eval_batch_size=2, max_new_tokens=4)
    assert made.evaluate()["eval_batches"] == 3
    assert calls == [(2, False), (2, False), (1, True)]


def test_batches_stay_apart_if_asked(tmp_path):
    _, [(seen, _)], _ = evaluated(tmp_path, eval_do_concat_batches=False)
    assert [batch.shape for batch in seen.predictions] == [(2, 3), (2, 3), (1, 3)]


def test_where_only_the_loss_is_wanted_nothing_else_is_given(tmp_path):
    output, seen, _ = evaluated(tmp_path, call=lambda made: made.predict(PROMPTS), prediction_loss_only=True)
    assert output.predictions is None and output.label_ids is None and not seen
    assert output.metrics["test_loss"] > 0


@pytest.mark.slow
def test_memory_is_measured_where_asked(tmp_path):
    metrics, _, made = evaluated(tmp_path, skip_memory_metrics=False)
    assert "eval_mem_cpu_alloc_delta" in metrics
    assert "test_mem_cpu_alloc_delta" in made.predict(PROMPTS).metrics


class Heard(TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name in ("on_prediction_step", "on_evaluate", "on_predict"):
            return lambda *_, **__: self.events.append(name)
        return super().__getattribute__(name)


def test_callbacks_hear_of_evaluations_and_they_may_come_first(tmp_path):
    heard = Heard()
    made = trainer(
        tmp_path,
        kwargs={"eval_dataset": PROMPTS, "callbacks": [heard]},
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
        per_device_eval_batch_size=3,
    )
    made.train()
    assert heard.events == 2 * ["on_prediction_step", "on_prediction_step", "on_evaluate"]
    assert [log["step"] for log in made.state.log_history if "eval_loss" in log] == [0, 1]
    made.predict(PROMPTS)
    assert heard.events[6:] == ["on_prediction_step", "on_prediction_step", "on_predict"]


def test_the_time_of_several_evaluation_sets_is_taken_off_once(tmp_path):
    made = trainer(tmp_path, kwargs={"eval_dataset": {"a": PROMPTS, "b": PROMPTS}})
    made.log_state.last_log = 0.0
    times = [value for name, value in made.evaluate().items() if name.endswith("_runtime")]
    assert sum(times) <= made.log_state.last_log < 1.9 * sum(times)


# what the policy reads ----------------------------------------------------------------------------------------------


class Tokens(TrainerCallback):
    """Counts the tokens of all forward passes of training, with and without padding."""

    def __init__(self, made):
        self.read, self.real = 0, 0
        training_step = made.training_step

        def counting(model, inputs, *args):
            for rows in inputs["passes"]:
                self.read += rows.tokens.ids_RT.numel()
                self.real += int((rows.tokens.tree_RT != PADDING).sum())
            return training_step(model, inputs, *args)

        made.training_step = counting


@pytest.mark.parametrize(("kind", "counted"), [("all", "read"), ("non_padding", "real"), (True, "read")])
def test_input_tokens_and_operations_are_counted(tmp_path, caplog, kind, counted):
    made = trainer(tmp_path, include_num_input_tokens_seen=kind, share_prompts=False, max_steps=2)
    tokens = Tokens(made)
    made.train()
    assert made.state.num_input_tokens_seen == getattr(tokens, counted) > 0
    assert made.state.total_flos == 6 * tokens.read * made.model.num_parameters(exclude_embeddings=True)
    assert tokens.real < tokens.read and "Tried to track" not in caplog.text


MIXTURES = {
    "mixtral": lambda **o: MixtralForCausalLM(tiny_experts(MixtralConfig, num_local_experts=4, **o)),
    "qwen2_moe": lambda **o: Qwen2MoeForCausalLM(
        tiny_experts(Qwen2MoeConfig, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **o)
    ),
}


def tiny_experts(kind, **options):
    torch.manual_seed(0)
    common = dict(vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    common |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=128)
    return kind(**common, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, bos_token_id=None, **options)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_balance_of_experts_is_not_in_the_loss_and_packing_changes_nothing(tmp_path, family, caplog):
    """A loss over all tokens of a row would count prompts once or K times."""
    make = MIXTURES[family]
    alone = gradient(tmp_path, model=make(), share_prompts=False, generation_kwargs={"renormalize_logits": True})
    with pytest.warns(UserWarning, match="It is not added here"), caplog.at_level(logging.WARNING):
        packed = gradient(tmp_path, model=make(output_router_logits=True, router_aux_loss_coef=10.0))
    assert_same(packed, alone, 1e-4)
    assert "slower path" not in caplog.text


@pytest.mark.slow
def test_a_compiled_policy_has_the_same_gradient(tmp_path):
    plain = gradient(tmp_path)
    compiled = gradient(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert_same({name.removeprefix("_orig_mod."): g for name, g in compiled.items()}, plain, 1e-5)


# optimizers that train other weights than they evaluate -------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """Trains one set of weights and evaluates their mean over the steps, as schedule-free optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["train_mode"] = False

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["steps"] = state.get("steps", 0) + 1
            mean = state.setdefault("mean", parameter.detach().clone())
            mean.lerp_(parameter.detach(), 1 / state["steps"])

    def train(self):
        self._exchange(True)

    def eval(self):
        self._exchange(False)

    def _exchange(self, mode):
        if self.param_groups[0]["train_mode"] != mode:
            for parameter in self.param_groups[0]["params"]:
                if "mean" in self.state[parameter]:
                    kept = parameter.detach().clone()
                    parameter.data.copy_(self.state[parameter]["mean"])
                    self.state[parameter]["mean"].copy_(kept)
            self.param_groups[0]["train_mode"] = mode


def averaging_run(folder, resume=None, **fields):
    model = tiny.causal_lm(sharpness=1.0)
    optimizer = Averaging(model.parameters(), lr=0.05)
    made = trainer(folder, model, kwargs={"optimizers": (optimizer, None), "eval_dataset": PROMPTS}, **fields)
    made.train(resume_from_checkpoint=resume)
    return made, optimizer


def sampling_gaps(made):
    """How far what was sampled from is from what is trained on: 0 on-policy."""
    name = "sampling/sampling_logp_difference/max"
    return [log[name] for log in made.state.log_history if name in log]


def test_weights_that_are_evaluated_and_saved_are_not_those_that_are_sampled_from(tmp_path):
    options = dict(max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    made, optimizer = averaging_run(tmp_path / "evaluating", **options)
    assert max(sampling_gaps(made)) < 1e-5
    plain, _ = averaging_run(tmp_path / "plain", max_steps=3)
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, weights(made.model)[name]), name
    assert not optimizer.param_groups[0]["train_mode"]  # what is left is what should be used
    saved = type(made.model).from_pretrained(tmp_path / "evaluating" / "checkpoint-3")
    for name, weight in weights(made.model).items():
        assert torch.equal(weight, weights(saved)[name]), name


def test_such_a_run_is_resumed_bit_for_bit(tmp_path):
    options = dict(max_steps=3, save_strategy="steps", save_steps=1)
    whole, _ = averaging_run(tmp_path / "whole", **options)
    again, _ = averaging_run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(again.model)[name]), name


# the card -----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_told(tmp_path):
    made = trainer(tmp_path)
    made.create_model_card(language="en", license="mit", tags="mine", finetuned_from="org/base", dataset_tags=["org/x"])
    card = (tmp_path / "README.md").read_text()
    for line in ("language: en", "license: mit", "- mine", "- online-dpo", "base_model: org/base", "- org/x"):
        assert line in card
    with pytest.raises(TypeError, match="tasks"):
        made.create_model_card(tasks="text-generation")
