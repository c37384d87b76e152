"""Which ways of sharding leave packed weights as they are."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig

from online_dpo.config.quantization import check_sharded, settings_of

FLOATS = {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}
BF16 = {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
PLAIN = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}


def arguments(fsdp=False, deepspeed=False, bf16=False, fp16=False):
    return SimpleNamespace(fsdp=fsdp, deepspeed_plugin=object() if deepspeed else None, bf16=bf16, fp16=fp16)


@pytest.mark.parametrize(
    "settings, fields",
    [
        (INT8, dict(deepspeed=True, bf16=True)),
        (INT8, dict(bf16=True)),
        (PLAIN, dict(fsdp=True, bf16=True)),
        (PLAIN, dict(deepspeed=True, bf16=True)),
        ({**PLAIN, "bnb_4bit_quant_storage": "int8"}, dict(fsdp=True, bf16=True)),
        (FLOATS, dict(fsdp=True)),
        (FLOATS, dict(deepspeed=True)),
        (FLOATS, dict(bf16=True)),
        (BF16, dict(fsdp=True, bf16=True)),
        (BF16, dict(deepspeed=True, bf16=True)),
        ({}, dict(fsdp=True)),
        ({"quant_method": "gptq"}, dict(fsdp=True)),
    ],
)
def test_what_trains_as_in_one_process_is_accepted(settings, fields):
    check_sharded(settings, arguments(**fields), {})


@pytest.mark.parametrize("settings", [INT8, settings_of({"quantization_config": BitsAndBytesConfig(**INT8)})])
def test_8_bits_are_not_sliced(settings):
    with pytest.raises(ValueError, match="`load_in_8bit` does not go with FSDP2.*`load_in_4bit: true`"):
        check_sharded(settings, arguments(fsdp=True), {})
    with pytest.raises(ValueError, match="`load_in_8bit` does not go with FSDP2"):
        check_sharded(settings, arguments(), {"ACCELERATE_USE_FSDP": "true"})


@pytest.mark.parametrize("way, name", [("fsdp", "FSDP2"), ("deepspeed", "DeepSpeed")])
@pytest.mark.parametrize("half, computed", [("bf16", "bfloat16"), ("fp16", "float16")])
@pytest.mark.parametrize(
    "settings",
    [
        FLOATS,
        settings_of(
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)}
        ),
    ],
    ids=["mapping", "object"],
)
def test_packed_weights_are_not_rounded_as_if_they_were_numbers(way, name, half, computed, settings):
    with pytest.raises(
        ValueError,
        match=f"`bnb_4bit_quant_storage` is float32, and {name} would .* to {computed}.*Set it to {computed}",
    ):
        check_sharded(settings, arguments(**{way: True, half: True}), {})
