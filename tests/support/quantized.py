"""Tiny models whose linear layers bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from support import tiny

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
INT8 = {"load_in_8bit": True}


def base_folder(folder: Path, sharpness: float = 1.0, **overrides: object) -> str:
    """A folder with a model that is not quantised; blocks of 64 numbers share a scale."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False, **overrides}
    tiny.causal_lm(sharpness=sharpness, **shape).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def loaded(folder: str, settings: dict) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))


def dequantized(quantized: PreTrainedModel) -> PreTrainedModel:
    """A model in fp32 that is not quantised, with the weights that the packed ones stand for."""
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    model = type(quantized)(config)
    weights = {}
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weights[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        plain = {f"{name}.{key}": p.detach().float() for key, p in module.named_parameters(recurse=False)}
        weights = plain | weights
    model.load_state_dict(weights)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval()
