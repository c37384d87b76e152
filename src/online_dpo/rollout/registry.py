"""Engines by name. The modules of vLLM's engines are loaded when one is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.registry import Registry
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.engine import Engine

EngineBuilder = Callable[[nn.Module, PreTrainedTokenizerBase, OnlineDPOConfig], Engine]
"""From the policy, its tokenizer and the configuration to an engine that samples from the policy."""

Builder = TypeVar("Builder", bound=EngineBuilder)

ENGINES: Registry[EngineBuilder] = Registry("engine")


def engine(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder: ``engine: name`` in a configuration then chooses it.

    >>> @engine("mine")
    ... def build(policy, tokenizer, args): return MyEngine(...)

    Raises:
        RegistryError: the name is taken.
    """
    return ENGINES.decorator(name, lambda builder: builder)


def build_engine(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """What samples completions, as the configuration says.

    Raises:
        ValueError: vLLM is not installed, or its options do not fit this machine.
        RolloutServerError: a server cannot be reached, or takes no weights.
    """
    return ENGINES[args.engine_name](policy, tokenizer, args)


@engine("transformers")
def built_in_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> TransformersEngine:
    """Samples from this model itself."""
    static_steps = None if args.cuda_graphs else False
    return TransformersEngine(model, tokenizer, args.rollout_batch_size, static_steps=static_steps)


@engine("vllm_colocate")
def colocated_vllm(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """Samples with vLLM in this process."""
    from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine

    return VLLMColocateEngine(policy, tokenizer, args)


@engine("vllm_server")
def vllm_servers(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """Samples with vLLM servers."""
    from online_dpo.rollout.vllm.server_engine import VLLMServerEngine

    return VLLMServerEngine(args.vllm_server_urls, tokenizer, args)
