"""Weights under their checkpoint names, adapters merged, the live model untouched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from online_dpo.rollout.weights.export import named_weights, write_weights
from support import tiny


def adapted(base, **fields):
    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **fields}
    return get_peft_model(base, LoraConfig(**fields)).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(weights, expected, atol=0.0):
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, atol=atol, rtol=0), name
        assert weights[name].dtype == tensor.dtype and not weights[name].requires_grad


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_a_saved_checkpoint(family, tied, tmp_path):
    model = tiny.causal_lm(family, tie_word_embeddings=tied)
    assert_same(dict(named_weights(model)), saved(model, tmp_path))


def test_weights_that_a_checkpoint_holds_in_another_shape_are_converted(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = MixtralConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=2, num_local_experts=4, **shape)
    model = MixtralForCausalLM(config)
    expected = saved(model, tmp_path)
    assert any(".experts.3." in name for name in expected)  # one by one there, in one tensor in the model
    assert_same(dict(named_weights(model)), expected)
    assert_same(dict(named_weights(MixtralForCausalLM.from_pretrained(tmp_path))), expected)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"bias": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens"], "tied": False},
        {"modules_to_save": ["norm", "lm_head"], "tied": False},
    ],
    ids=str,
)
def test_adapters_are_merged_and_the_model_stays_as_it_is(fields, tmp_path):
    base = tiny.causal_lm("qwen2", tie_word_embeddings=fields.pop("tied", True))
    model = adapted(base, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = dict(named_weights(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same(weights, saved(model.merge_and_unload(), tmp_path), atol=1e-6)


def test_gpt2s_transposed_layers_are_merged(tmp_path):
    model = adapted(tiny.causal_lm("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    assert_same(dict(named_weights(model)), saved(model.merge_and_unload(), tmp_path), atol=1e-6)


def test_only_active_adapters_count(tmp_path):
    model = adapted(tiny.causal_lm())
    plain = saved(tiny.causal_lm(), tmp_path)
    first = dict(named_weights(model))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    assert_same(dict(named_weights(model)), first)
    model.set_adapter("second")
    second = dict(named_weights(model))
    assert {n for n in plain if not torch.equal(second[n], plain[n])} == {
        f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)
    }
    with model.disable_adapter():
        assert_same(dict(named_weights(model)), plain)


def test_a_merged_adapter_is_not_merged_again():
    model = adapted(tiny.causal_lm())
    expected = dict(named_weights(model))
    model.merge_adapter()
    assert_same(dict(named_weights(model)), expected, atol=1e-6)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}], ids=str)
def test_adapters_that_are_more_than_a_matrix_to_add_are_refused(fields):
    model = adapted(tiny.causal_lm("qwen2"), **fields)
    with pytest.raises(ValueError, match=r"`model.layers.0.*_proj` \(Linear\) cannot be merged"):
        list(named_weights(model))


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_on_tied_weights_are_refused(fields):
    model = adapted(tiny.causal_lm("qwen2"), **fields)
    with pytest.raises(ValueError, match="tied to another weight"):
        list(named_weights(model))


def test_quantised_models_are_refused():
    model = adapted(tiny.causal_lm())
    model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="QLoRA"):
        named_weights(model)


def test_files_are_cut_where_they_grow_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.rollout.weights.export.SHARD_BYTES", 20_000)
    model = tiny.causal_lm()
    write_weights(model, tmp_path)
    files = sorted(tmp_path.iterdir())
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.offset_keys()}
    assert len(files) > 2
    assert_same(weights, dict(named_weights(model)))
