"""Sampling with vLLM in the trainer's own process, on the trainer's own device.

vLLM holds a second copy of the weights, which `sync` updates. With sleep mode, this copy is moved to host memory and
the KV cache is freed while the model is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import RankErrors, world_size
from online_dpo.distributed.device_memory import empty_device_cache, free_kept_memory
from online_dpo.distributed.process_state import environment, kept_random_state
from online_dpo.errors import error_text
from online_dpo.modeling.introspection import (
    computing_dtype,
    context_length,
    is_quantized,
    unwrapped,
)
from online_dpo.modeling.precision import autocast_dtype
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.colocated_adapter import ColocatedAdapter, base_options
from online_dpo.rollout.vllm.requests import build_groups, build_requests, from_output, vllm_sampling
from online_dpo.rollout.vllm.worker import EXTENSION, coarsest
from online_dpo.rollout.weights.export import streamed, write_weights
from online_dpo.types import Group, Prompt

SLEEP_LEVEL = 1  # weights are kept in host memory, so that `generate` works again without another `sync`


class VLLMColocateEngine:
    """Samples from a copy of the policy that vLLM holds in this process.

    Args:
        model: the policy, or a PEFT model around it; vLLM starts with its architecture and dummy weights, which the
            first `sync` replaces. If it is quantised, vLLM starts with its base model, loaded from the same folder
            without quantisation, and `sync` gives it the adapter alone.
        tokenizer: decodes completions and finds stop strings.
        args: the fields ``vllm_gpu_memory_utilization``, ``vllm_tensor_parallel_size``, ``vllm_enable_sleep_mode``,
            ``vllm_model_impl``, ``max_length``, ``rollout_batch_size`` (the largest number of completions that are
            decoded at the same time), ``bf16``, ``fp16``, ``seed`` and ``trust_remote_code`` are used.
        vllm_options: further arguments of `vllm.LLM`, such as ``{"enforce_eager": True}``. They override ``args``.

    Raises:
        ValueError: vLLM is not installed, or the options are not possible on this machine.
    """

    has_own_weights = True
    overlaps = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
        vllm_options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._in_process = args.vllm_tensor_parallel_size == 1
        self._sleeps = args.vllm_enable_sleep_mode
        self._asleep: set[str] = set()
        self._version: int | None = None
        self._errors = RankErrors(args.device)
        self._owns_process_group = not torch.distributed.is_initialized()
        _check_options(args)
        by_adapter = is_quantized(model)
        options = {**engine_options(model, args), **(base_options(model) if by_adapter else {}), **(vllm_options or {})}
        # vLLM seeds all random generators when it starts, and draws from torch's later on.
        with TemporaryDirectory(prefix="online-dpo-vllm-") as folder, kept_random_state():
            unwrapped(model).config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self._llm = _start_vllm({"model": folder, "tokenizer": folder, **options})
        self._adapter = ColocatedAdapter(self._llm, model) if by_adapter else None
        self.own_dtype: torch.dtype | None = coarsest(self._llm.collective_rpc("online_dpo_dtype"))
        self._fall_asleep()

    def sync(self, model: nn.Module, version: int) -> None:
        """Copies the weights into vLLM, unless it already has those of this version. A collective operation.

        Sharded weights are gathered one by one (`streamed`), so that no rank holds all of them beside vLLM's copy.
        """
        if version == self._version:
            return
        self._version = None  # until all weights are loaded: an error may leave a mixture
        self._errors.run(lambda: self._wake("weights"))
        self._errors.run(lambda: self._load(model, str(version)))
        self._version = version

    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """Samples K completions for each prompt; returns the groups in the prompts' order."""
        from vllm import SamplingParams as VLLMParams  # pyright: ignore

        assert self._version is not None, "sync comes before generate"
        requests = build_requests(prompts, num_completions, vllm_sampling(params), key)
        self._wake("weights")
        self._wake("kv_cache")
        with kept_random_state():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                [VLLMParams(**request.options, detokenize=bool(params.stop_strings)) for request in requests],
                use_tqdm=False,
                lora_request=None if self._adapter is None else self._adapter.request,
            )
        groups = build_groups(prompts, [from_output(o) for o in outputs], self.tokenizer, self._version)
        self._fall_asleep()
        return groups

    def release(self) -> None:
        """Does nothing: between calls vLLM keeps its memory, or has freed it already (``vllm_enable_sleep_mode``)."""

    def close(self) -> None:
        """Frees vLLM's memory. A process group that vLLM has created is destroyed; the trainer's is kept."""
        from vllm.distributed.parallel_state import destroy_model_parallel  # pyright: ignore[reportMissingImports]

        client = self._llm.llm_engine.engine_core
        del self._llm
        if self._owns_process_group:
            client.shutdown()
        else:
            client._finalizer.detach()  # it would call `client.shutdown`, which also destroys the trainer's group
            client.engine_core.model_executor.shutdown()
            destroy_model_parallel()
        del client
        empty_device_cache()

    def _load(self, model: nn.Module, label: str) -> None:
        """Loads the weights as they come. A collective operation if they are sharded: each rank has its own engine."""
        if self._adapter is not None:
            self._adapter.load(model)
        elif self._in_process:
            with streamed(model) as weights:
                self._llm.collective_rpc("online_dpo_load", args=(weights, label))
        else:  # the workers are other processes on this machine
            with TemporaryDirectory(prefix="online-dpo-weights-") as folder:
                write_weights(model, Path(folder))
                self._llm.collective_rpc("online_dpo_load_folder", args=(folder, label))
        if not self._llm.reset_prefix_cache():  # it holds keys and values of the old weights
            raise RuntimeError("vLLM could not empty its prefix cache: a request is still running.")

    def _fall_asleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=SLEEP_LEVEL)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, part: str) -> None:
        """Wakes one part of a sleeping vLLM: ``weights`` or ``kv_cache``. The parts are separate so that weights can be
        loaded while the KV cache takes no memory. vLLM takes its memory from the device: what torch and others hold
        without using it would be in the way.
        """
        if part in self._asleep:
            free_kept_memory()
            self._llm.wake_up([part])
            self._asleep.remove(part)


def engine_options(model: nn.Module, args: OnlineDPOConfig) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for this model and configuration."""
    limits = [limit for limit in (args.max_length, context_length(model)) if limit is not None]
    options: dict[str, Any] = {
        "worker_extension_cls": EXTENSION,
        "load_format": "dummy",
        "dtype": str(_dtype(model, args)).removeprefix("torch."),
        "max_model_len": min(limits) if limits else None,
        "max_num_seqs": args.rollout_batch_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "enable_sleep_mode": args.vllm_enable_sleep_mode,
        "model_impl": args.vllm_model_impl,
        "enable_prefix_caching": True,
        "enforce_eager": not torch.cuda.is_available(),  # on a CPU, compilation takes longer than it saves
        "generation_config": "vllm",
        "trust_remote_code": args.trust_remote_code,
        "seed": args.seed,
    }
    if args.vllm_gpu_memory_utilization is None:
        del options["gpu_memory_utilization"]
    if _several_ranks():  # each rank has its own engine, which uses the trainer's process group
        options["distributed_executor_backend"] = "external_launcher"
    return options


def _dtype(model: nn.Module, args: OnlineDPOConfig) -> torch.dtype:
    """The dtype for vLLM: that of mixed precision or of the weights; with quantised weights that of their products."""
    quantized = is_quantized(model)
    return autocast_dtype(args) or (computing_dtype(model) if quantized else unwrapped(model).dtype)


def _check_options(args: OnlineDPOConfig) -> None:
    if args.vllm_enable_sleep_mode and not torch.cuda.is_available():
        raise ValueError(
            "`vllm_enable_sleep_mode` needs a GPU: on a CPU there is no device memory to free. Leave it off."
        )
    if args.vllm_tensor_parallel_size > 1 and _several_ranks():
        raise ValueError(
            "`vllm_tensor_parallel_size` must be 1 when several processes train, because each samples for its own "
            'prompts. Use `vllm_mode="server"` for a model that does not fit on one device.'
        )


def _several_ranks() -> bool:
    return world_size() > 1


def _start_vllm(options: dict[str, Any]) -> Any:
    """Starts `vllm.LLM` in this process.

    Raises:
        ValueError: vLLM cannot be imported.
    """
    try:
        from vllm import LLM  # pyright: ignore
    except ImportError as error:
        raise ValueError(
            f"`use_vllm` needs vLLM, which cannot be imported ({error_text(error)}). Install `online-dpo[vllm]`."
        ) from error
    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"):  # one process, so that weights are passed by reference
        return LLM(**options)
