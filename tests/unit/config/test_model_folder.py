"""What is said of model folders before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config.model_folder import folder_problem

GOOD = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 4}


def weights(tensors: dict[str, Any], data: int) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


def entry(start: int, stop: int, shape: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


WHOLE = weights({"__metadata__": {"format": "pt"}, "a.weight": entry(0, 16, [2, 2]), "b": entry(16, 20, [1])}, 20)


def folder(path: Path, config: Any = GOOD, data: bytes | None = WHOLE, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    if data is not None:
        (path / "model.safetensors").write_bytes(data)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_whole_model_has_no_problem(tmp_path):
    for role in ("policy", "reference", "judge"):
        assert folder_problem(str(folder(tmp_path / "m")), role) is None
    assert folder_problem(str(folder(tmp_path / "n", data=None)), "policy") is None  # loading says what is missing
    assert folder_problem("owner/name", "policy") is None
    score = {**GOOD, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert folder_problem(str(folder(tmp_path / "r", score)), "reward") is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "model.safetensors is empty."),
        (b"\1\0\0", "is cut short."),
        (WHOLE[:60], "is cut short: it ends within its header."),
        (WHOLE[:-6], "is cut short: 6 bytes are missing."),
        (WHOLE + b"\0", "is longer than its header says."),
        (b"<!doctype html><html>404</html>" * 9, "is no safetensors file."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
        (struct.pack("<Q", 2**62) + b"{}", "is no safetensors file."),
        (struct.pack("<Q", 4) + b"{ab}" + bytes(9), "has a damaged header."),
        (weights({}, 0), "holds no tensors."),
        (weights({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, 8), "`b` overlaps another one."),
        (weights({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20), "`b` does not follow the one before it."),
        (weights({"a": entry(0, 8, [3])}, 8), "the shape of `a` does not fit its place."),
        (weights({"a": entry(0, 8, [-1, -2])}, 8), "the shape of `a` does not fit its place."),
        (weights({"a": entry(0, 8, [10**12, 10**9])}, 8), "the shape of `a` does not fit its place."),
        (weights({"a": {"dtype": "F32"}}, 8), "`a` is not described."),
        (weights({"a": [1]}, 8), "`a` is not described."),
        (weights({"a.weight": entry(0, 4, [2, 2], "I8")}, 4), "`a.weight` is of type I8"),
        (weights({"a.weight": entry(0, 4, [2, 2], "F8_E4M3")}, 4), "`a.weight` is of type F8_E4M3"),
    ],
)
def test_damaged_weights_are_told_by_their_header(tmp_path, data, says):
    problem = folder_problem(str(folder(tmp_path / "m", data=data)), "policy")
    assert problem is not None and says in problem and problem.startswith(f"{tmp_path}/m: ")
    assert "\n" not in problem


def test_weights_of_8_bits_are_read_with_a_quantisation_or_as_masks(tmp_path):
    data = weights({"a.weight": entry(0, 4, [2, 2], "I8")}, 4)
    path = folder(tmp_path / "m", {**GOOD, "quantization_config": {"quant_method": "x"}}, data)
    assert folder_problem(str(path), "policy") is None
    mask = weights({"attn.bias": entry(0, 4, [2, 2], "U8"), "b": entry(4, 8, [1])}, 8)
    assert folder_problem(str(folder(tmp_path / "n", data=mask)), "policy") is None


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": [1]}', "is damaged"),
        ('{"weight_map": {"a.weight": "no.safetensors"}}', "no.safetensors is missing, which model.safetensors.index"),
        ('{"weight_map": {"a.weight": "../m/one.safetensors"}}', "which is not in the folder"),
        ('{"weight_map": {"a.weight": "/etc/passwd"}}', "which is not in the folder"),
        ('{"weight_map": {"a.weight": "config.json"}}', "which is no safetensors file"),
        ('{"weight_map": {"c": "one.safetensors", "b": "one.safetensors"}}', "one.safetensors lacks `c`, which"),
    ],
)
def test_an_index_promises_what_its_shards_hold(tmp_path, index, says):
    path = folder(tmp_path / "m", data=None)
    (path / "one.safetensors").write_bytes(WHOLE)
    good = '{"weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}'
    (path / "model.safetensors.index.json").write_text(good)
    assert folder_problem(str(path), "policy") is None
    (path / "model.safetensors.index.json").write_text(index)
    problem = folder_problem(str(path), "policy")
    assert problem is not None and says in problem


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("", "config.json is no valid JSON"),
        ("[]", "config.json holds no JSON object"),
        ("[" * 20_000 + "]" * 20_000, "config.json is no valid JSON (too deeply nested)"),
        ('{"rms_norm_eps": NaN}', "config.json holds a number that is NaN"),
        ({**GOOD, "model_type": [1]}, "`model_type` is no name"),
        ({**GOOD, "vocab_size": 10**12}, "`vocab_size` is 1000000000000, which no model has"),
        ({**GOOD, "num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000, but the weights are 2 tensors"),
        ({**GOOD, "num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({**GOOD, "num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({**GOOD, "hidden_size": "16"}, "`hidden_size` is '16'; wanted: a whole number"),
        ({**GOOD, "text_config": {"hidden_size": 1.5}}, "`hidden_size` is 1.5"),
        ({**GOOD, "pad_token_id": 4}, "`pad_token_id` is 4, but the vocabulary has 4 tokens"),
        ({**GOOD, "eos_token_id": "</s>"}, "`eos_token_id` is '</s>'; wanted: the id of a token"),
        ({**GOOD, "dtype": "float99"}, "`dtype` is 'float99'"),
        ({**GOOD, "architectures": "LlamaForCausalLM"}, "`architectures` is no list"),
        ({**GOOD, "architectures": ["BertForMaskedLM"]}, "says BertForMaskedLM, which is no causal language model"),
        ({**GOOD, "architectures": ["LlamaModel"]}, "says LlamaModel"),
        ({**GOOD, "architectures": ["LlamaForSequenceClassification"]}, "is no causal language model"),
    ],
)
def test_configs_that_no_policy_has(tmp_path, config, says):
    problem = folder_problem(str(folder(tmp_path / "m", config)), "policy")
    assert problem is not None and says in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "says LlamaForCausalLM, which is no reward model"),
        ({"architectures": ["LlamaForTokenClassification"]}, "which is no reward model"),
        ({"id2label": {"0": "bad", "1": "good"}}, "config.json has 2 labels"),
        ({"num_labels": 3}, "config.json has 3 labels"),
        (
            {"problem_type": "single_label_classification"},
            "`problem_type` is 'single_label_classification', which names classes",
        ),
    ],
)
def test_labels_that_are_no_score(tmp_path, change, says):
    config = {**GOOD, "architectures": ["LlamaForSequenceClassification"], **change}
    problem = folder_problem(str(folder(tmp_path / "m", config)), "reward")
    assert problem is not None and says in problem


def test_limits_of_infinity_and_lists_by_layer_are_right(tmp_path):
    config = '{"model_type": "x", "time_step_limit": [0.0, Infinity], "intermediate_size": [1, 2], "n_head": null}'
    assert folder_problem(str(folder(tmp_path / "m", config)), "policy") is None
    code = {**GOOD, "architectures": ["ChatGLMModel"], "auto_map": {"AutoModelForCausalLM": "x.Y"}}
    assert folder_problem(str(folder(tmp_path / "n", code)), "policy") is None


def test_options_that_choose_other_files_skip_the_weights(tmp_path):
    path = str(folder(tmp_path / "m", data=b""))
    assert folder_problem(path, "policy") is not None
    assert folder_problem(path, "policy", {"variant": "fp16"}) is None


def test_an_adapter_and_its_base(tmp_path):
    def adapter(**config: Any) -> str:
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(WHOLE)
        return str(tmp_path / "a")

    base = folder(tmp_path / "base")
    assert folder_problem(adapter(base_model_name_or_path=str(base)), "policy") is None
    assert folder_problem(adapter(base_model_name_or_path="owner/name"), "policy") is None
    assert "is not there" in str(folder_problem(adapter(base_model_name_or_path="./none"), "policy"))
    assert "is no name" in str(folder_problem(adapter(base_model_name_or_path=[1]), "policy"))
    assert "holds no config.json" in str(folder_problem(adapter(base_model_name_or_path=str(tmp_path / "a")), "policy"))
    (base / "model.safetensors").write_bytes(b"")
    problem = folder_problem(adapter(base_model_name_or_path=str(base)), "policy")
    assert problem is not None and f"its base model {base}: model.safetensors is empty" in problem
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(WHOLE[:-1])
    assert "1 bytes are missing" in str(folder_problem(str(tmp_path / "a"), "policy"))
