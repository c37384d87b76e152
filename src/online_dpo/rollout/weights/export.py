"""The policy's weights in the form of a Hugging Face checkpoint (names, shapes), which vLLM's loader expects, with
adapters merged.

The model that is trained is only read: an adapter is merged into a copy of one weight at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from online_dpo.distributed.weights import full, is_sharded
from online_dpo.modeling.introspection import is_quantized, unwrapped

SHARD_BYTES = 1 << 30
ADAPTERS_ALONE = (
    "The weights of a quantised policy (QLoRA) cannot be sent to vLLM, its adapter alone can be. Start the servers "
    "with `online-dpo serve MODEL --lora-rank RANK`: the folder or name of the policy's base model, and the "
    "adapter's rank (`lora_r`)."
)
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Submodules that stand for their parent: of FSDP's activation checkpointing, and of a compiled layer."""

Weight = tuple[str, Callable[[], torch.Tensor]]
"""A checkpoint name, and what computes the whole weight: a collective operation if the model is sharded."""


@contextmanager
def streamed(model: nn.Module) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Gives `named_weights` to a consumer that may stop early or fail.

    If the model is sharded, this is a collective operation, and what the consumer leaves is gathered at the end: the
    other ranks wait for this one at each weight.

    Raises:
        ValueError: as `named_weights`, on every rank and before any weight is gathered.
    """
    weights = named_weights(model)
    try:
        yield chain(weights)  # unlike a generator, it cannot be closed by the consumer
    finally:
        if is_sharded(model):
            for _ in weights:
                pass


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, with its checkpoint name; tied weights with the name of the weight they are tied to.

    Sharded weights are gathered one by one, or layer by layer where memory and checkpoint differ in shapes. That is a
    collective operation: every rank must exhaust the iterator, as `streamed` does.

    Raises:
        ValueError: the model is quantised, or has an adapter that cannot be merged weight by weight.
    """
    base = unwrapped(model)
    if is_quantized(model):
        raise ValueError(ADAPTERS_ALONE)
    peft = is_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))
    tied = base.all_tied_weights_keys
    both = {*tied.keys(), *tied.values()} if peft else set()
    weights = [(name, whole) for name, whole in _weights_of(base, "", both) if name not in tied]
    # A few model families have other shapes in memory than in checkpoints (fused experts). Converting them back needs
    # all weights of a layer at the same time.
    if getattr(base, "_weight_conversions", None) or get_model_conversion_mapping(base, add_legacy=False):
        return _converted(base, weights)
    return ((name, whole()) for name, whole in weights)


def write_weights(model: nn.Module, folder: Path | None) -> None:
    """Writes `named_weights` to ``folder`` as safetensors files of about 1 GiB, of which memory holds one at a time. A
    collective operation if weights are sharded: ranks that are not to write pass ``None``.
    """
    with streamed(model) as weights:
        if folder is not None:
            _write(weights, folder)


def _write(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in weights:
        shard[name] = tensor.cpu().contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / f"{number:05d}.safetensors")
            shard, number = {}, number + 1
    if shard:
        save_file(shard, folder / f"{number:05d}.safetensors")


def _converted(base: PreTrainedModel, weights: Iterable[Weight]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in the shapes that a checkpoint has. Memory holds one layer at a time; what belongs to no layer, such
    as embeddings and the output head, counts as one.
    """
    layers: dict[str, list[Weight]] = {}
    for name, whole in weights:
        layers.setdefault(_layer_of(name), []).append((name, whole))
    for layer in layers.values():
        converted = revert_weight_conversion(base, {name: whole() for name, whole in layer})
        for name in list(converted):
            yield name, converted.pop(name)


def _layer_of(name: str) -> str:
    """The part of a name up to the number of the layer; empty if it has none.

    >>> _layer_of("model.layers.3.mlp.experts.7.w1.weight")
    'model.layers.3'
    """
    parts = name.split(".")
    before = list(takewhile(lambda part: not part.isdigit(), parts))
    return ".".join(parts[: len(before) + 1]) if len(before) < len(parts) else ""


def _weights_of(module: nn.Module, prefix: str, tied: set[str]) -> Iterator[Weight]:
    """The parameters and persistent buffers of a module, with the names of the base model and active adapters merged.

    Args:
        tied: names of weights that no adapter may change.
    """
    peft = sys.modules.get("peft")  # if it was never imported, no module is one of its own
    if peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        yield from _refusing(tied, _merged_layer(module, prefix))
    elif peft is not None and isinstance(module, peft.utils.other.ModulesToSaveWrapper):
        adapters: Any = [] if module.disable_adapters else module.active_adapters
        copies: Any = module.modules_to_save
        active: Any = copies[adapters[0]] if adapters else module.original_module
        yield from _refusing(tied, _weights_of(active, prefix, tied))
    elif peft is not None and isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        raise ValueError(_cannot_merge(prefix, type(module).__name__))
    else:
        buffers = dict(module.named_buffers(recurse=False))
        persistent = {n: b for n, b in buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**dict(module.named_parameters(recurse=False)), **persistent}.items():
            yield prefix + name, partial(full, tensor)
        for name, child in module.named_children():
            yield from _weights_of(child, prefix if name in WRAPPERS else f"{prefix}{name}.", tied)


def _refusing(tied: set[str], weights: Iterable[Weight]) -> Iterator[Weight]:
    for name, whole in weights:
        if name in tied:
            raise ValueError(
                f"An adapter changes `{name}`, which is tied to another weight, so that vLLM could not hold both. "
                "Leave the embeddings out of the adapter, or load the model with `tie_word_embeddings=False`."
            )
        yield name, whole


def _merged_layer(layer: Any, prefix: str) -> Iterator[Weight]:
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
    for name, whole in _weights_of(layer.get_base_layer(), prefix, set()):
        merges = name == f"{prefix}weight" and adapters
        yield name, partial(_merged, layer, whole, adapters) if merges else whole


@torch.no_grad()
def _merged(layer: Any, base: Callable[[], torch.Tensor], adapters: list[str]) -> torch.Tensor:
    """The whole weight of a LoRA layer with these adapters."""
    weight, delta = base(), _Delta(layer)
    for adapter in adapters:
        matrices = {name: full(p) for name, p in delta.named_parameters() if name.split(".")[2:3] == [adapter]}
        weight = (weight + functional_call(delta, matrices, (adapter,))).to(weight.dtype)
    return weight


class _Delta(nn.Module):
    """What an adapter adds to the weight of its layer, as a function of its matrices."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter: str) -> torch.Tensor:
        """Returns ``scaling * B @ A``."""
        return self.layer.get_delta_weight(adapter)


def _cannot_merge(prefix: str, kind: str) -> str:
    """The message for an adapter layer that cannot be merged."""
    return (
        f"The adapter layer `{prefix.rstrip('.')}` ({kind}) cannot be merged weight by weight for vLLM. Use plain LoRA "
        "(no DoRA, no `lora_bias`, no quantised base), or sample without `use_vllm`."
    )
