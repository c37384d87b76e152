"""How completions are sampled, and what their random numbers depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from online_dpo.config.sampling import SAMPLING_FIELDS
from online_dpo.config.trainer_config import OnlineDPOConfig


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    ``extra`` holds options of `transformers.GenerationConfig` that have no field here. A completion ends at any of
    ``end_token_ids`` (which it keeps) or when its text ends in one of ``stop_strings``.

    >>> SamplingParams(max_new_tokens=64, end_token_ids=(2,), temperature=0.9)
    """

    max_new_tokens: int
    end_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, args: OnlineDPOConfig, end_token_ids: tuple[int, ...]) -> SamplingParams:
        """The configuration's fields, overridden by its ``generation_kwargs``."""
        params = cls(
            max_new_tokens=args.max_new_tokens,
            end_token_ids=end_token_ids,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        )
        extra: dict[str, Any] = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
        if args.cache_implementation is not None:
            extra["cache_implementation"] = args.cache_implementation
        overrides: dict[str, Any] = {name: extra.pop(name) for name in SAMPLING_FIELDS if name in extra}
        if "stop_strings" in extra:
            stops = extra.pop("stop_strings")
            overrides["stop_strings"] = (stops,) if isinstance(stops, str) else tuple(stops)
        if "eos_token_id" in extra:
            ends = extra.pop("eos_token_id")
            overrides["end_token_ids"] = (ends,) if isinstance(ends, int) else tuple(ends)
        return replace(params, **overrides, extra=extra)


class Stream(IntEnum):
    """What random numbers are for, so that no two uses draw the same ones.

    ``HELD_OUT``, the quickstart's samples that are judged, has the number of ``PAIRING``, and keeps it because its
    published figures hang on it. Only ``best_random`` reads the numbers of pairing, one for each training prompt of a
    step; the quickstart pairs best with worst, and held-out prompts are never paired.
    """

    TRAINING = 0
    EVALUATION = 1
    REFERENCE = 2
    PAIRING = 3
    HELD_OUT = 3
    ANSWERS = 4
    OPPONENT = 5
    SYNC_CHECK = 6
    FOR_KL = 7


@dataclass(frozen=True)
class RolloutKey:
    """Names one call of an engine, so that its random numbers are a function of (seed, step, prompt, sample) alone.

    ``stream`` keeps uses apart. ``first_sample`` is the number of the first completion of each prompt: completions
    beyond the K of an earlier call with the same key differ from them.
    """

    seed: int
    step: int
    stream: int = Stream.TRAINING
    first_sample: int = 0

    def samples(self, num_completions: int) -> range:
        """The numbers of a prompt's completions."""
        return range(self.first_sample, self.first_sample + num_completions)
