"""How a run file says that the policy is loaded, and what reaches ``from_pretrained``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.quantizers.auto import AutoQuantizationConfig
from trl import ModelConfig, get_quantization_config

from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.model_options import ignored_options, model_init_kwargs, model_problems
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.config import requirements
from support.run_files import fill_folder, trainer_of, write_run_file

QLORA = {"use_peft": True, "load_in_4bit": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": True, "dtype": "bfloat16"},
        {"load_in_4bit": True, "dtype": "float16", "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
        {"load_in_4bit": True, "dtype": "float32", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
)
def test_quantisation_is_that_of_trl(fields: dict[str, Any]) -> None:
    ours = AutoQuantizationConfig.from_dict(model_init_kwargs(fields)["quantization_config"])
    theirs = get_quantization_config(ModelConfig(**fields))
    assert theirs is not None and ours.to_dict() == theirs.to_dict()


def test_four_bits_are_computed_with_in_bfloat16_unless_a_type_is_given() -> None:
    def computed_in(**fields: Any) -> str:
        return model_init_kwargs({**QLORA, **fields})["quantization_config"]["bnb_4bit_compute_dtype"]

    assert computed_in() == computed_in(dtype="auto") == "bfloat16"
    assert computed_in(dtype="float16") == "float16"
    assert computed_in(dtype="float16", bnb_4bit_compute_dtype="float32") == "float32"


def test_fields_join_model_init_kwargs() -> None:
    values = {"dtype": "bfloat16", "attn_implementation": "eager", "model_revision": "v2"}
    assert model_init_kwargs({**values, "model_init_kwargs": {"variant": "x"}}) == {
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "revision": "v2",
        "variant": "x",
    }
    assert "revision" not in model_init_kwargs(values, without=("model_revision",))
    assert model_init_kwargs({"use_peft": True}) == {}


@pytest.mark.parametrize(
    ("values", "field", "problem"),
    [
        ({"dtype": "bfloat16", "model_init_kwargs": {"dtype": "auto"}}, "dtype", "is given beside `dtype`"),
        ({"dtype": "bfloat16", "model_init_kwargs": {"torch_dtype": "auto"}}, "dtype", "is given beside `torch_dtype`"),
        ({"model_revision": "a", "model_init_kwargs": {"revision": "b"}}, "model_revision", "is given beside `revisio"),
        ({**QLORA, "load_in_8bit": True}, "load_in_4bit", "is given beside `load_in_8bit`. Give one of them."),
        ({"load_in_8bit": True}, "load_in_8bit", "needs an adapter: quantised weights themselves cannot be trained."),
        (
            {**QLORA, "model_init_kwargs": {"quantization_config": {}}},
            "load_in_4bit",
            "is given beside `quantization_config`",
        ),
    ],
)
def test_contradictions(values: dict[str, Any], field: str, problem: str) -> None:
    assert any(name == field and text.startswith(problem) for name, text in model_problems(values, is_trained=True))


def test_what_is_missing_and_what_is_not_read() -> None:
    found = dict(model_problems(QLORA, is_trained=True))
    missing = "needs bitsandbytes. Install it with: pip install 'online-dpo[qlora]'"
    assert found == ({"load_in_4bit": missing} if requirements.BITSANDBYTES.missing else {})
    assert list(model_problems({"attn_implementation": "eager"}, is_trained=True)) == []
    assert ignored_options({"bnb_4bit_quant_type": "fp4"}) == ["bnb_4bit_quant_type"]
    assert ignored_options({**QLORA, "bnb_4bit_quant_type": "fp4"}) == []


def test_a_run_loads_the_policy_as_its_file_says(tmp_path: Path) -> None:
    fill_folder(tmp_path, "def reward(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    fields = dict(reward_funcs="feedback.py:reward", dtype="bfloat16", attn_implementation="eager", use_peft=True)
    adapter = dict(lora_r=4, use_rslora=True, lora_modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer_of(write_run_file(tmp_path, **fields, **adapter))
    base: Any = made.policy.get_base_model()  # pyright: ignore[reportCallIssue]
    assert base.config._attn_implementation == "eager"
    assert base.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    peft = made.policy.peft_config["default"]  # pyright: ignore
    assert (peft.r, peft.use_rslora, list(peft.modules_to_save)) == (4, True, ["lm_head"])


def test_a_wrong_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    given = {"model_name_or_path": "a/b", "dataset_name": "a/c", "reward_model_path": "a/r", "dtype": "bf16"}
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(UsageError, match="`dtype` is 'bf16'; wanted: one of auto, float32, bfloat16, float16 or null"):
        plan_run(path, [])
