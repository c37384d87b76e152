"""Requests to vLLM and its answers as plain data. Pure functions; nothing here imports vLLM.

Each request is for one completion, so that each has its own seed. Thanks to vLLM's prefix cache, the prompt that the
requests of a group share is still computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from online_dpo.rollout.completion_text import completion_texts
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Completion, FinishReason, Group, Prompt

RENAMED_OPTIONS = {"min_new_tokens": "min_tokens", "bad_words": "bad_words"}
LOWEST_TEMPERATURE = 0.01  # vLLM silently raises lower temperatures to this
NEVER = -100.0  # the lowest logit bias that vLLM accepts


@dataclass(frozen=True)
class Request:
    """A request for one completion.

    >>> Request(prompt_ids=(5, 81, 7), options={"temperature": 0.9, "seed": 1234, ...})

    ``options`` are valid both as keyword arguments of `vllm.SamplingParams` and as fields of a `/v1/completions` body.
    """

    prompt_ids: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """The completion that vLLM sampled for one request.

    >>> Sampled(token_ids=(9, 4, 2), logprobs=(-0.1, -1.3, -0.2), finish_reason="stop")
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


def vllm_sampling(params: SamplingParams) -> dict[str, Any]:
    """The options that all requests have in common: all but the seed.

    Only ``end_token_ids`` end a completion: ``ignore_eos`` keeps vLLM from adding those of the model folder. Every
    option is set, so that no default of a server, or of a model folder's generation config, has an effect.

    Raises:
        ValueError: an option has no counterpart in vLLM.
    """
    unknown = sorted(set(params.extra) - {*RENAMED_OPTIONS, "suppress_tokens"})
    if unknown:
        raise ValueError(
            f"vLLM has no counterpart of {', '.join(f'`{name}`' for name in unknown)}. Remove it from "
            "`generation_kwargs` (and `cache_implementation`), or sample without `use_vllm`."
        )
    if params.temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"`temperature` must be at least {LOWEST_TEMPERATURE} with vLLM; it is {params.temperature}.")
    options: dict[str, Any] = {
        "n": 1,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p or 0.0,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(params.stop_strings),
        "stop_token_ids": list(params.end_token_ids),
        "ignore_eos": True,
        "logprobs": 0,  # the sampled token's alone
        "skip_special_tokens": True,
    }
    options |= {RENAMED_OPTIONS[name]: value for name, value in params.extra.items() if name in RENAMED_OPTIONS}
    if params.extra.get("suppress_tokens"):
        options["logit_bias"] = {token: NEVER for token in params.extra["suppress_tokens"]}
    return options


def completion_seed(key: RolloutKey, row: int, sample: int) -> int:
    """The seed of one completion: 63 bits that depend on (seed, step, stream, row, sample) alone (Philox, as in
    `uniform_numbers`).
    """
    philox = np.random.Philox(key=[key.seed, key.step], counter=[0, key.stream, row, sample])
    return int(philox.random_raw()) >> 1


def build_requests(
    prompts: Sequence[Prompt], num_completions: int, options: dict[str, Any], key: RolloutKey
) -> list[Request]:
    """K requests for each prompt, in the order of the prompts."""
    return [
        Request(prompt.token_ids, {**options, "seed": completion_seed(key, prompt.row, sample)})
        for prompt in prompts
        for sample in key.samples(num_completions)
    ]


def from_output(output: Any) -> Sampled:
    """The completion in a `vllm.RequestOutput`."""
    [best] = output.outputs
    token_ids = tuple(best.token_ids)
    logprobs = tuple(position[token].logprob for position, token in zip(best.logprobs, token_ids, strict=True))
    return Sampled(token_ids, logprobs, _finish_reason(best.finish_reason))


def from_response(body: dict[str, Any]) -> Sampled:
    """The completion in the JSON of a `/v1/completions` answer."""
    [choice] = body["choices"]
    logprobs = tuple(choice["logprobs"]["token_logprobs"])
    return Sampled(tuple(choice["token_ids"]), logprobs, _finish_reason(choice["finish_reason"]))


def build_groups(
    prompts: Sequence[Prompt], sampled: Sequence[Sampled], tokenizer: PreTrainedTokenizerBase, version: int
) -> list[Group]:
    """The groups made of the completions for the requests of `build_requests`, given in the same order."""
    if not sampled:
        return []
    texts = completion_texts(tokenizer, prompts, [s.token_ids for s in sampled])
    completions = [
        Completion(s.token_ids, s.logprobs, s.finish_reason, version, text)
        for s, text in zip(sampled, texts, strict=True)
    ]
    k = len(completions) // len(prompts)
    return [Group(prompt, tuple(completions[p * k : (p + 1) * k])) for p, prompt in enumerate(prompts)]


def _finish_reason(reason: str | None) -> FinishReason:
    """The finish reason, checked: any but these two (such as ``abort``) means that the completion is not complete.

    Raises:
        RuntimeError: vLLM did not finish the completion.
    """
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM did not finish a completion; its finish reason is {reason!r}.")
    return cast(FinishReason, reason)
