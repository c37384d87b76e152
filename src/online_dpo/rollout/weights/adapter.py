"""The policy's LoRA adapter as files, for vLLM servers that apply it to the base model that they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn

from online_dpo.distributed.weights import full
from online_dpo.modeling.introspection import is_quantized

START_WITHOUT = "Start the server without `--lora-rank`, so that it takes the merged weights."
QUANTIZED = "Change the adapter, or sample without `use_vllm`: that of a quantised policy cannot be merged."


def check_adapter(model: nn.Module, most_rank: int | None, otherwise: str | None = None) -> None:
    """Checks that vLLM can load the policy's adapter.

    Args:
        most_rank: of adapters that a server can load; ``None``: any.
        otherwise: what to do if it cannot.

    Raises:
        ValueError: the policy is not a base model with one plain LoRA adapter of rank ``most_rank`` or less.
    """
    policy: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    otherwise = otherwise or (QUANTIZED if is_quantized(policy) else START_WITHOUT)
    if not is_peft_model(policy):
        raise ValueError(f"The server takes adapters only, but all weights of the policy are trained. {otherwise}")
    config = policy.active_peft_config
    plain = config.peft_type == "LORA" and len(policy.active_adapters) == 1
    if not plain or config.use_dora or config.lora_bias or config.modules_to_save or config.bias != "none":
        raise ValueError(f"vLLM takes one plain LoRA adapter: no DoRA, no biases, no `modules_to_save`. {otherwise}")
    rank = adapter_rank(policy)
    if most_rank is not None and rank > most_rank:
        raise ValueError(
            f"The adapter has rank {rank}; start the server with `--lora-rank {rank}` (it has {most_rank})."
        )
    embedded = [name for name, layer in policy.named_modules() if _is_adapted_embedding(layer)]
    if embedded:
        raise ValueError(f"vLLM takes no adapter on an embedding ({embedded[0]}). {otherwise}")


def adapter_rank(model: nn.Module) -> int:
    """The largest rank in the policy's active LoRA adapter."""
    policy: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    config = policy.active_peft_config
    return max([config.r, *config.rank_pattern.values()])


def write_adapter(model: nn.Module, folder: Path | None) -> None:
    """Writes ``adapter_config.json`` and the adapter's weights to ``folder``. A collective operation if weights are
    sharded: ranks that are not to write pass ``None``.
    """
    policy: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    [name] = policy.active_adapters
    whole = ((key, full(parameter)) for key, parameter in policy.named_parameters() if f".{name}." in key)
    weights = {key: tensor.cpu() for key, tensor in whole if folder is not None}
    if folder is not None:
        policy.save_pretrained(str(folder), state_dict=weights, selected_adapters=[name], save_embedding_layers=False)
        if name != "default":  # PEFT writes other adapters to a subfolder
            for file in (folder / name).iterdir():
                file.rename(folder / file.name)


def _is_adapted_embedding(layer: nn.Module) -> bool:
    from peft.tuners.lora import Embedding

    return isinstance(layer, Embedding)
