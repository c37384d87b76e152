"""Sampling options, and the keys of random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from online_dpo.config.sampling import SAMPLING_FIELDS
from online_dpo.config.trainer_config import OnlineDPOConfig


@dataclass(frozen=True)
class SamplingParams:
    """The options with which completions are sampled.

    A completion ends at any of ``end_token_ids`` (which it keeps), or when its text ends with one of ``stop_strings``.
    ``extra`` has options of `transformers.GenerationConfig` for which there is no field here.

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
        """The options of a configuration: its fields, overridden by its ``generation_kwargs``."""
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
    """What random numbers are used for. Each use is a stream of its own, so that no two draw the same numbers.

    ``HELD_OUT`` (the held-out samples of the quickstart) has the same number as ``PAIRING``, and keeps it because
    published figures depend on it. They do not collide: only ``best_random`` uses the numbers of ``PAIRING``, one for
    each training prompt of a step; the quickstart pairs best with worst, and held-out prompts are never paired.
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
    """Identifies one call of an engine, so that its random numbers are a function of (seed, step, prompt, sample)
    alone.

    ``stream`` separates different uses. ``first_sample`` is the index of the first completion of each prompt: a second
    call with the same key and ``first_sample=K`` gives K further completions, which differ from the first K.
    """

    seed: int
    step: int
    stream: int = Stream.TRAINING
    first_sample: int = 0

    def samples(self, num_completions: int) -> range:
        """The indices of a prompt's completions."""
        return range(self.first_sample, self.first_sample + num_completions)
