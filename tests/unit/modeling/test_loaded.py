"""Weights that a folder lacks, has too many of, or that are torn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from online_dpo.errors import ModelFolderError
from online_dpo.foreign import loading
from online_dpo.modeling.loaded import check_finite, check_not_zero
from online_dpo.modeling.loading import load_causal_lm
from support import tiny

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def policy(tmp_path) -> Path:
    tiny.causal_lm().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def change(folder: Path, edit: Callable[[dict], object], file: str = "model.safetensors") -> str:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    return str(folder)


def configure(folder: Path, file: str = "config.json", **fields: object) -> str:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **fields}))
    return str(folder)


def load(path: str):
    with loading(path):
        return load_causal_lm(path, None, False)


def refused(path: str, capfd) -> str:
    with pytest.raises(ModelFolderError) as error:
        load(path)
    assert "LOAD REPORT" not in capfd.readouterr().err
    assert "\n" not in str(error.value) and path in str(error.value)
    return str(error.value)


def test_weights_that_would_be_random(policy, capfd):
    assert f"it has no weights for `{UP}`, which would be random" in refused(change(policy, lambda t: t.pop(UP)), capfd)


def test_a_head_that_is_not_tied_and_not_there(policy, capfd):
    assert "no weights for `lm_head.weight`" in refused(configure(policy, tie_word_embeddings=False), capfd)


def test_weights_of_another_shape(policy, capfd):
    text = refused(change(policy, lambda t: t.update({UP: t[UP][:3]})), capfd)
    assert f"`{UP}` has the shape (3, 32), and by its config.json (48, 32)" in text


def test_layers_that_would_be_left_out(policy, capfd):
    assert "has weights of more layers than its config.json says" in refused(
        configure(policy, num_hidden_layers=1), capfd
    )


def test_the_head_of_a_classifier(policy, capfd):
    text = refused(change(policy, lambda t: t.update({"score.weight": torch.ones(1, 32)})), capfd)
    assert "it has the head of a classifier (`score.weight`)" in text


def test_other_weights_are_ignored_in_one_line(policy, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        load(change(policy, lambda t: t.update({"other": torch.ones(2)})))
    assert [record.getMessage() for record in caplog.records if record.name == "online_dpo.modeling.loaded"] == [
        f"`{policy}` holds weights that its model has no place for; they are ignored: `other`."
    ]
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_class_of_another_type(policy, capfd):
    text = refused(configure(policy, architectures=["GPT2LMHeadModel"]), capfd)
    assert "its class is GPT2LMHeadModel, and its `model_type` 'llama'" in text


def test_a_quantisation_that_nobody_knows(policy, capfd):
    assert "wants the quantisation 'nope'" in refused(
        configure(policy, quantization_config={"quant_method": "nope"}), capfd
    )


def test_an_encoder(tmp_path, capfd):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=44)
    BertLMHeadModel(BertConfig(**shape, is_decoder=True)).save_pretrained(tmp_path / "bert")
    load(str(tmp_path / "bert"))
    assert "is an encoder" in refused(configure(tmp_path / "bert", is_decoder=False), capfd)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_causal_family_is_taken_for_an_encoder(tmp_path, family):
    """The configs of GPT-NeoX (Pythia) say `is_decoder: false`."""
    tiny.causal_lm(family).save_pretrained(tmp_path)
    assert load(str(tmp_path)).config.model_type == family


def test_a_matrix_of_zeros_and_what_may_be_zero():
    model = tiny.causal_lm()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
        model.model.embed_tokens.weight[0] = 0.0
        check_not_zero(model, "m")
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(ModelFolderError, match=rf"`m`: `{UP}` holds nothing but zeros"):
        check_not_zero(model, "m")


def test_numbers_that_are_not_finite():
    model = tiny.causal_lm()
    check_finite(model, "m")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelFolderError, match=rf"`m`: `{UP}` holds numbers that are NaN or infinite"):
        check_finite(model, "m")


@pytest.fixture
def adapter(policy, tmp_path) -> Path:
    model = get_peft_model(tiny.causal_lm(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(policy)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


FILE = "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_an_adapter_loads_as_it_was_saved(adapter):
    model = load(str(adapter))
    saved = load_file(adapter / FILE)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], saved[name]) for name in saved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name.replace(".weight", ".default.weight") for name in saved
    }


def test_adapters_that_do_not_fit(adapter, capfd):
    whole = (adapter / FILE).read_bytes()
    assert "lacks weights that its adapter_config.json wants" in refused(
        change(adapter, lambda t: t.pop(A), FILE), capfd
    )
    (adapter / FILE).write_bytes(whole)
    assert f"`{A.replace('.weight', '.default.weight')}` holds nothing but zeros" in refused(
        change(adapter, lambda t: t.update({A: t[A] * 0}), FILE), capfd
    )
    (adapter / FILE).write_bytes(whole)
    assert "size mismatch" in refused(change(adapter, lambda t: t.update({A: t[A][:1]}), FILE), capfd)
    (adapter / FILE).write_bytes(whole)
    other = A.replace("q_proj", "up_proj")
    assert "has no place for" in refused(change(adapter, lambda t: t.update({other: t[A].clone()}), FILE), capfd)
    (adapter / FILE).unlink()
    assert "holds no weights of an adapter" in refused(str(adapter), capfd)


def test_an_adapter_whose_base_lacks_weights(adapter, policy, capfd):
    change(policy, lambda t: t.pop(UP))
    with pytest.raises(ModelFolderError, match=f"`{policy}` is no trained causal language model"):
        load(str(adapter))
