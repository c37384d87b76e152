"""Adapters over weights that bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from online_dpo.errors import ModelFolderError
from online_dpo.modeling.borrowing import adapter_off
from online_dpo.modeling.introspection import computing_dtype
from support import quantized, run_files, tiny, training
from support.quantized import INT8, NF4

ALL_LINEAR = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
BF16 = {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}
DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True}
IDS = torch.arange(4, 20)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return quantized.base_folder(tmp_path_factory.mktemp("base"))


def qlora(tmp_path, base, settings=NF4, lora=None, **fields):
    lora = LoraConfig(**(lora or ALL_LINEAR))
    options = {"model": base, "model_init_kwargs": {"quantization_config": settings}, **fields}
    return training.trainer(tmp_path, kwargs={"peft_config": lora}, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "settings, fields",
    [
        (NF4, {}),
        (NF4, dict(gradient_checkpointing=True, gradient_accumulation_steps=2, per_device_train_batch_size=2)),
        (DOUBLE, dict(gradient_checkpointing=True, share_prompts=False)),
        ({**NF4, "bnb_4bit_quant_storage": "float32"}, {}),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, {}),
    ],
    ids=["nf4", "checkpointed", "double", "stored-as-floats", "fp4"],
)
def test_gradients_are_those_over_the_weights_that_the_packed_ones_stand_for(tmp_path, base, settings, fields):
    found = []
    for make in (lambda model: model, quantized.dequantized):
        model = make(quantized.loaded(base, settings))
        torch.manual_seed(5)
        options = dict(max_steps=3, learning_rate=0.5, kwargs={"peft_config": LoraConfig(**ALL_LINEAR)}, **fields)
        found.append(training.gradient(tmp_path, model=model, **options))
    assert len(found[0]) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
    training.assert_same(*found, rtol=1e-5)


def test_steps_are_trained_on_what_was_sampled(tmp_path, base, caplog):
    made = qlora(tmp_path, base, max_steps=3, learning_rate=1e-2)
    made.train()
    assert sum(isinstance(module, Linear4bit) for module in made.model.modules()) == 14
    logs = training.train_logs(made)
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-5 and log["grad_norm"] > 0.01 for log in logs)
    assert logs[0]["objective/kl"] == pytest.approx(0, abs=1e-6) and abs(logs[-1]["objective/kl"]) > 1e-3
    assert "slower path" not in caplog.text
    with adapter_off(made.model) as reference:
        assert torch.equal(logits(reference), logits(quantized.dequantized(quantized.loaded(base, NF4))))


@pytest.mark.parametrize("settings", [BF16, INT8], ids=["nf4-in-bf16", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_products_of_few_bits_are_held_to_their_own_rounding(tmp_path, base, settings, caplog):
    made = qlora(tmp_path, base, settings, max_steps=2, learning_rate=1e-2)
    assert computing_dtype(made.model) == torch.bfloat16  # although norms and embeddings are in fp32
    made.train()
    assert any(isinstance(module, (Linear4bit, Linear8bitLt)) for module in made.model.modules())
    assert all(log["grad_norm"] > 0.01 for log in training.train_logs(made))
    assert "slower path" not in caplog.text


@pytest.mark.parametrize("given", [DOUBLE, BitsAndBytesConfig(**DOUBLE)], ids=["mapping", "object"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, base, given):
    def run(name, **fields):
        made = qlora(tmp_path / name, base, given, save_strategy="steps", save_steps=2, max_steps=4, **fields)
        made.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2") if name == "resumed" else None)
        return {name: p for name, p in made.model.named_parameters() if p.requires_grad}

    whole, resumed = run("whole"), run("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_saved_adapter_loads_again_over_the_quantised_base_and_over_the_plain_one(tmp_path, base):
    made = qlora(tmp_path, base, max_steps=2, learning_rate=1e-2)
    made.train()
    made.save_model()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    again = PeftModel.from_pretrained(quantized.dequantized(quantized.loaded(base, NF4)), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(made.model.eval()), rtol=0, atol=1e-5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path))
    assert logits(plain.merge_and_unload()).isfinite().all()
    made.create_model_card()
    assert "(llama, nf4)" in (tmp_path / "README.md").read_text()


def test_an_adapter_folder_over_a_quantised_base_is_trained_on(tmp_path, base):
    first = qlora(tmp_path / "first", base, max_steps=2, learning_rate=1e-2)
    first.train()
    first.save_model()
    more = training.trainer(
        tmp_path / "more", model=str(tmp_path / "first"), model_init_kwargs={"quantization_config": NF4}
    )
    torch.testing.assert_close(logits(more.model.eval()), logits(first.model.eval()), rtol=0, atol=1e-6)
    more.train()
    assert training.train_logs(more)[0]["grad_norm"] > 0.01


def test_biases_of_a_quantised_model_are_trained_with_a_reference_that_keeps_its_own(tmp_path):
    folder = quantized.base_folder(tmp_path / "base", attention_bias=True)
    made = qlora(tmp_path, folder, lora={**ALL_LINEAR, "bias": "all"}, max_steps=2, learning_rate=1e-2)
    made.train()
    assert "copy" in made.reference.description
    with made.reference.active() as model:
        assert torch.equal(logits(model), logits(quantized.dequantized(quantized.loaded(folder, NF4))))


def test_biases_that_a_layer_would_round_in_every_pass_are_not_trained(tmp_path):
    folder = quantized.base_folder(tmp_path / "base", attention_bias=True)
    with pytest.raises(
        ValueError, match="q_proj.base_layer.bias` is to be trained.*bfloat16.*`bnb_4bit_compute_dtype` to float32"
    ):
        qlora(tmp_path, folder, BF16, lora={**ALL_LINEAR, "bias": "all"})


@pytest.mark.parametrize("as_object", [False, True])
def test_without_an_adapter_a_quantised_model_is_refused_before_it_is_loaded(tmp_path, base, as_object):
    given = (
        dict(model=quantized.loaded(base, NF4))
        if as_object
        else dict(model="never/loaded", model_init_kwargs={"quantization_config": NF4})
    )
    with pytest.raises(ValueError, match="is quantised .* needs an adapter.*Give a `peft_config`"):
        training.trainer(tmp_path, **given)


def test_a_folder_with_quantised_weights_is_trained_through_an_adapter_alone(tmp_path, base):
    quantized.loaded(base, NF4).save_pretrained(tmp_path / "packed")
    tiny.tokenizer().save_pretrained(tmp_path / "packed")
    packed = str(tmp_path / "packed")
    with pytest.raises(ValueError, match="`model` is quantised \\(bitsandbytes\\) and needs an adapter"):
        training.trainer(tmp_path, model=packed)
    made = training.trainer(tmp_path, model=packed, kwargs={"peft_config": LoraConfig(**ALL_LINEAR)})
    made.train()
    assert training.train_logs(made)[0]["grad_norm"] > 0.01


def test_a_model_whose_weights_were_packed_for_reading_alone_is_refused(tmp_path, base):
    used = quantized.loaded(base, NF4)
    layer = used.model.layers[0].mlp.up_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on CPUs alone that multiply in bf16")
    logits(used.eval())
    with pytest.raises(ValueError, match="was used on this CPU before.*Load it again"):
        training.trainer(tmp_path, model=used, kwargs={"peft_config": LoraConfig(**ALL_LINEAR)})


@pytest.mark.parametrize("settings", [NF4, DOUBLE, INT8], ids=["nf4", "double", "int8"])
@pytest.mark.parametrize("value, message", [(0.0, "up_proj.*nothing but zeros"), (float("nan"), "not finite.*up_proj")])
def test_weights_that_no_model_has_are_found_behind_their_scales(tmp_path, base, settings, value, message):
    folder = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ModelFolderError, ValueError), match=message):
        qlora(tmp_path, str(folder), settings).train()


def test_a_peft_model_over_quantised_weights(tmp_path, base):
    model = get_peft_model(quantized.loaded(base, NF4), LoraConfig(**ALL_LINEAR))
    made = training.trainer(tmp_path, model=model, max_steps=2, learning_rate=1e-2)
    made.train()
    assert all(log["grad_norm"] > 0.01 for log in training.train_logs(made))


@pytest.mark.parametrize(
    "fields",
    [
        dict(load_in_4bit=True, bnb_4bit_compute_dtype="float32", use_bnb_nested_quant=True),
        dict(model_init_kwargs={"quantization_config": DOUBLE}),
    ],
    ids=["as-in-trl", "mapping"],
)
def test_run_files(tmp_path, fields):
    feedback = "def reward(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    folder = run_files.fill_folder(tmp_path, feedback)
    path = run_files.write_run_file(folder, reward_funcs="feedback.py:reward", use_peft=True, **fields)
    made = run_files.trainer_of(path)
    layer = made.model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit) and layer.weight.quant_state.nested
    assert layer.weight.quant_state.quant_type == "nf4" and layer.compute_dtype == torch.float32
    made.train()
    assert training.train_logs(made)[0]["grad_norm"] > 0
