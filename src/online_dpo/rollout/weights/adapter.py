"""The policy's LoRA adapter as files, for vLLM servers that apply it to the base model that they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn

from online_dpo.distributed.sharding import full

START_WITHOUT = "Start the server without `--lora-rank`, so that it takes the merged weights."


def check_adapter(model: nn.Module, most_rank: int) -> None:
    """Checks that a vLLM server can load the policy's adapter.

    Raises:
        ValueError: the policy is not a base model with one plain LoRA adapter of rank ``most_rank`` or less.
    """
    policy: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    if not is_peft_model(policy):
        raise ValueError(f"The server takes adapters only, but all weights of the policy are trained. {START_WITHOUT}")
    config = policy.active_peft_config
    plain = config.peft_type == "LORA" and len(policy.active_adapters) == 1
    if not plain or config.use_dora or config.lora_bias or config.modules_to_save or config.bias != "none":
        raise ValueError(
            "A vLLM server takes one plain LoRA adapter: no DoRA, no biases, no `modules_to_save`. " + START_WITHOUT
        )
    rank = max([config.r, *config.rank_pattern.values()])
    if rank > most_rank:
        raise ValueError(
            f"The adapter has rank {rank}; start the server with `--lora-rank {rank}` (it has {most_rank})."
        )
    embedded = [name for name, layer in policy.named_modules() if _is_adapted_embedding(layer)]
    if embedded:
        raise ValueError(f"A vLLM server takes no adapter on an embedding ({embedded[0]}). {START_WITHOUT}")


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
