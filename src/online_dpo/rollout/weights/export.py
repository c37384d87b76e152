"""The policy's weights as vLLM's loader expects them: names and shapes of a Hugging Face checkpoint, adapters merged.

The live model is read and never changed: an adapter is merged into a copy of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from online_dpo.modeling.introspection import unwrapped

SHARD_BYTES = 1 << 30


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, under its checkpoint name; tied weights under the name of the one they are tied to.

    Sharded weights are gathered one after the other, so every rank has to go through the whole iteration.

    Raises:
        ValueError: the model is quantised, or has an adapter that cannot be merged weight by weight.
    """
    base = unwrapped(model)
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "The weights of a quantised model (QLoRA) cannot be sent to vLLM, which holds them unquantised. Load the "
            "model without quantisation, or sample without `use_vllm`."
        )
    peft = is_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))
    weights = _merged_weights(base) if peft else _plain_weights(base, "")
    tied = base.all_tied_weights_keys
    weights = ((name, full_tensor(tensor)) for name, tensor in weights if name not in tied)
    # Few families are held in other shapes than their checkpoints (fused experts); only these need all at once.
    if getattr(base, "_weight_conversions", None) or get_model_conversion_mapping(base, add_legacy=False):
        return iter(revert_weight_conversion(base, dict(weights)).items())
    return weights


def write_weights(model: nn.Module, folder: Path | None) -> None:
    """Writes `named_weights` to ``folder`` as safetensors files of about a gibibyte, so that memory holds one at a
    time. Ranks that only help to gather sharded weights give ``None``.
    """
    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in named_weights(model):
        if folder is None:
            continue
        shard[name] = tensor.cpu().contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / f"{number:05d}.safetensors")
            shard, number = {}, number + 1
    if folder is not None and shard:
        save_file(shard, folder / f"{number:05d}.safetensors")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded: then a collective operation."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers of a module without adapters."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield prefix + name, tensor


def _merged_weights(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The same names as before PEFT put its layers in, with what the active adapters make of the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    tied = {*base.all_tied_weights_keys.keys(), *base.all_tied_weights_keys.values()}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(module, BaseTunerLayer):
            yield from refusing_tied(_merged_layer(module, prefix))
        elif isinstance(module, ModulesToSaveWrapper):
            used = [] if module.disable_adapters else module.active_adapters
            active = module.modules_to_save[used[0]] if used else module.original_module
            yield from refusing_tied(_plain_weights(active, prefix))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(_cannot_merge(prefix, type(module).__name__))
        else:
            own = {name: t for name, t in module.named_parameters(recurse=False)}
            saved = set(module.state_dict(keep_vars=True))
            own |= {name: t for name, t in module.named_buffers(recurse=False) if name in saved}
            for name, tensor in own.items():
                yield prefix + name, tensor
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.")

    def refusing_tied(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name in tied:
                raise ValueError(
                    f"An adapter changes `{name}`, which is tied to another weight, so that vLLM could not hold both. "
                    "Leave the embeddings out of the adapter, or load the model with `tie_word_embeddings=False`."
                )
            yield name, tensor

    yield from walk(base, "")


def _merged_layer(layer: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A LoRA layer's weight plus ``scaling * B @ A`` of each active adapter, in the weight's own type."""
    from peft.tuners import lora
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        raise ValueError(_cannot_merge(prefix, type(layer).__name__))
    used = [] if layer.disable_adapters else [a for a in layer.active_adapters if a not in layer.merged_adapters]
    used = [adapter for adapter in used if adapter in layer.scaling]
    # variants such as DoRA, and biases of B, are more than a matrix to add
    special = any(adapter in layer.lora_variant or layer.lora_bias.get(adapter) for adapter in used)
    if special or not isinstance(layer, (lora.Linear, lora.Embedding)):
        raise ValueError(_cannot_merge(prefix, type(layer).__name__))
    for name, tensor in layer.get_base_layer().state_dict(keep_vars=True).items():
        if name == "weight":
            with torch.no_grad():
                for adapter in used:
                    tensor = (tensor + layer.get_delta_weight(adapter)).to(tensor.dtype)
        yield prefix + name, tensor


def _cannot_merge(prefix: str, kind: str) -> str:
    return (
        f"The adapter layer `{prefix.rstrip('.')}` ({kind}) cannot be merged weight by weight for vLLM. Use plain LoRA "
        "(no DoRA, no `lora_bias`, no quantised base), or sample without `use_vllm`."
    )
