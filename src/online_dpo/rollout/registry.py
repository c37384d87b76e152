"""The registry of engines by name. The modules of vLLM engines are imported only when one is built."""

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
"""A function that builds an engine from the policy, its tokenizer and the configuration."""

Builder = TypeVar("Builder", bound=EngineBuilder)

ENGINES: Registry[EngineBuilder] = Registry("engine")


def engine(name: str) -> Callable[[Builder], Builder]:
    """Registers a function that builds an engine; ``engine: name`` in a configuration then selects it.

    >>> @engine("mine")
    ... def build(policy, tokenizer, args): return MyEngine(...)

    Raises:
        RegistryError: the name is taken.
    """
    return ENGINES.decorator(name, lambda builder: builder)


def build_engine(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """Builds the engine that the configuration names.

    Raises:
        ValueError: vLLM is not installed, or its options are not possible on this machine.
        RolloutServerError: a server cannot be reached, or does not take weights.
    """
    return ENGINES[args.engine_name](policy, tokenizer, args)


@engine("transformers")
def built_in_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> TransformersEngine:
    """The built-in engine: samples from the model that is trained."""
    static_steps = None if args.cuda_graphs else False
    compile_steps = None if args.compile_sampling else False
    return TransformersEngine(
        model, tokenizer, args.rollout_batch_size, static_steps=static_steps, compile_steps=compile_steps
    )


@engine("vllm_colocate")
def colocated_vllm(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """The engine that runs vLLM in this process."""
    from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine

    return VLLMColocateEngine(policy, tokenizer, args)


@engine("vllm_server")
def vllm_servers(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """The engine that uses vLLM servers."""
    from online_dpo.rollout.vllm.server_engine import VLLMServerEngine

    return VLLMServerEngine(args.vllm_server_urls, tokenizer, args)
