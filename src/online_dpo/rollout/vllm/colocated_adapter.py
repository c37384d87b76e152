"""The policy's adapter for a vLLM in this process that holds the base model: for a quantised policy (QLoRA), whose
adapter cannot be merged.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from online_dpo.config.vllm import supported_lora_rank
from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.loading import source_of
from online_dpo.rollout.vllm.worker import differing_shape
from online_dpo.rollout.weights.adapter import adapter_rank, check_adapter, write_adapter

OTHERWISE = "Change the adapter, or sample without `use_vllm`."


def base_options(model: nn.Module) -> dict[str, Any]:
    """The arguments of `vllm.LLM` with which it holds the base model as its folder has it, and room for the adapter.

    Raises:
        ValueError: vLLM cannot load the policy's adapter, or the base model was loaded from nowhere.
    """
    check_adapter(model, None, OTHERWISE)
    config = unwrapped(model).config
    source = source_of(model)
    if source is None:
        raise ValueError(
            "vLLM has to load the base model of a quantised policy by itself, and the policy does not say where from. "
            "Load it with `from_pretrained`, or sample without `use_vllm`."
        )
    return {
        "model": str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,
        "revision": getattr(config, "_commit_hash", None),
        "load_format": "auto",
        "enable_lora": True,
        "max_lora_rank": supported_lora_rank(adapter_rank(model)),
        "max_loras": 1,
        "max_cpu_loras": 2,  # the next one is loaded before the last is removed
    }


class ColocatedAdapter:
    """Gives a vLLM in this process each version of the adapter, under a name of its own: so its prefix cache never
    mixes versions.

    Raises:
        ValueError: vLLM has loaded a base model of another shape than the policy's.
    """

    def __init__(self, llm: Any, model: nn.Module) -> None:
        self._llm = llm
        self._numbers = itertools.count(1)
        self.request: Any = None
        """The adapter of the last `load`, for `vllm.LLM.generate`."""
        [served, *_] = llm.collective_rpc("online_dpo_shape")
        if differ := differing_shape(served, unwrapped(model).config.get_text_config()):
            raise ValueError(
                f"vLLM has loaded another base model than the policy's from {source_of(model)}: {differ}. Save the "
                "base model as it is, load the policy from there, and start again."
            )

    def load(self, model: nn.Module) -> None:
        """Loads the policy's present adapter, and forgets the last. A collective operation if weights are sharded."""
        from vllm.lora.request import LoRARequest  # pyright: ignore

        number, engine = next(self._numbers), self._llm.llm_engine
        with TemporaryDirectory(prefix="online-dpo-adapter-") as folder:
            write_adapter(model, Path(folder))
            request = LoRARequest(f"online-dpo-{number}", number, folder)
            if not engine.add_lora(request):
                raise RuntimeError("vLLM has not loaded the adapter.")
        if self.request is not None:
            engine.remove_lora(self.request.lora_int_id)
        self.request = request
