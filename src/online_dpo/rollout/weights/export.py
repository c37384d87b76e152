"""The policy's weights in the form of a Hugging Face checkpoint (names, shapes), which vLLM's loader expects, with
adapters merged.

The model that is trained is only read: an adapter is merged into a copy of one weight at a time.
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

from online_dpo.modeling.introspection import is_quantized, unwrapped

SHARD_BYTES = 1 << 30
ADAPTERS_ALONE = (
    "The weights of a quantised policy (QLoRA) cannot be sent to vLLM, its adapter alone can be. Start the servers "
    "with `online-dpo serve MODEL --lora-rank RANK`: the folder or name of the policy's base model, and the "
    "adapter's rank (`lora_r`)."
)


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, with its checkpoint name; tied weights with the name of the weight they are tied to.

    Sharded weights are gathered one by one, which is a collective operation: every rank must exhaust the iterator.

    Raises:
        ValueError: the model is quantised, or has an adapter that cannot be merged weight by weight.
    """
    base = unwrapped(model)
    if is_quantized(model):
        raise ValueError(ADAPTERS_ALONE)
    peft = is_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))
    weights = _merged_weights(base) if peft else _plain_weights(base, "")
    tied = base.all_tied_weights_keys
    weights = ((name, full_tensor(tensor)) for name, tensor in weights if name not in tied)
    # A few model families have other shapes in memory than in checkpoints (fused experts). Converting them back needs
    # all weights at the same time.
    if getattr(base, "_weight_conversions", None) or get_model_conversion_mapping(base, add_legacy=False):
        return iter(revert_weight_conversion(base, dict(weights)).items())
    return weights


def write_weights(model: nn.Module, folder: Path | None) -> None:
    """Writes `named_weights` to ``folder`` as safetensors files of about 1 GiB, of which memory holds one at a time. A
    collective operation if weights are sharded: ranks that are not to write pass ``None``.
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
    """The full tensor of a tensor that may be sharded; a collective operation if it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of a module without adapters."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield prefix + name, tensor


def _merged_weights(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model with PEFT layers: under the names of the base model, with active adapters merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    tied = {*base.all_tied_weights_keys.keys(), *base.all_tied_weights_keys.values()}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(module, BaseTunerLayer):
            yield from refusing_tied(_merged_layer(module, prefix))
        elif isinstance(module, ModulesToSaveWrapper):
            adapters = [] if module.disable_adapters else module.active_adapters
            active = module.modules_to_save[adapters[0]] if adapters else module.original_module
            yield from refusing_tied(_plain_weights(active, prefix))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(_cannot_merge(prefix, type(module).__name__))
        else:
            tensors = {name: t for name, t in module.named_parameters(recurse=False)}
            persistent = set(module.state_dict(keep_vars=True))
            tensors |= {name: t for name, t in module.named_buffers(recurse=False) if name in persistent}
            for name, tensor in tensors.items():
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
    """A LoRA layer's weight plus ``scaling * B @ A`` of each active adapter, in the weight's own dtype."""
    from peft.tuners import lora
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        raise ValueError(_cannot_merge(prefix, type(layer).__name__))
    adapters = [] if layer.disable_adapters else [a for a in layer.active_adapters if a not in layer.merged_adapters]
    adapters = [adapter for adapter in adapters if adapter in layer.scaling]
    # Variants such as DoRA, and biases of B, cannot be merged by adding a matrix to the weight.
    special = any(adapter in layer.lora_variant or layer.lora_bias.get(adapter) for adapter in adapters)
    if special or not isinstance(layer, (lora.Linear, lora.Embedding)):
        raise ValueError(_cannot_merge(prefix, type(layer).__name__))
    for name, tensor in layer.get_base_layer().state_dict(keep_vars=True).items():
        if name == "weight":
            with torch.no_grad():
                for adapter in adapters:
                    tensor = (tensor + layer.get_delta_weight(adapter)).to(tensor.dtype)
        yield prefix + name, tensor


def _cannot_merge(prefix: str, kind: str) -> str:
    """The message for an adapter layer that cannot be merged."""
    return (
        f"The adapter layer `{prefix.rstrip('.')}` ({kind}) cannot be merged weight by weight for vLLM. Use plain LoRA "
        "(no DoRA, no `lora_bias`, no quantised base), or sample without `use_vllm`."
    )
