"""Fields of the configuration that say how completions are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from online_dpo.config.checking import check_numbers
from online_dpo.config.field_specs import documented
from online_dpo.config.hf_ranges import absurd

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that shape the distribution of the next token; `generation_kwargs` may hold them as well, and wins."""


@documented
@dataclass
class SamplingFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- sampling ---------------------------------------------------------------------------------------------------

    num_completions: int = 2
    """Completions sampled for each prompt (K). `pair_selection` says how many pairs are formed of them."""

    max_new_tokens: int = 64
    """Longest completion, in tokens."""

    max_length: int | None = 512
    """Longest prompt plus completion, in tokens. A prompt is cut on the left, once and before sampling, to
    `max_length - max_new_tokens`. `None`: prompts are not limited by it."""

    max_prompt_length: int | None = None
    """Longest prompt, in tokens; when not set, `max_length - max_new_tokens`."""

    truncate_prompts: bool = True
    """Cut prompts that are too long on the left. When off, such a prompt is invalid: see `invalid_prompts`."""

    temperature: float = 0.9
    """Sampling temperature; above 0."""

    top_p: float = 1.0
    """Sample from the most probable tokens that together reach this probability; in (0, 1], 1 is off."""

    top_k: int = 0
    """Sample from this many most probable tokens; 0 is off."""

    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one; in [0, 1]."""

    repetition_penalty: float = 1.0
    """Above 1, tokens that already stand in the prompt or the completion become less probable; 1 is off."""

    generation_kwargs: dict[str, Any] | str | None = None
    """Further options of `transformers.GenerationConfig`, such as `{"stop_strings": ["\\n\\n"]}`. They override the
    fields above and are sampled through `model.generate`."""

    cache_implementation: str | None = None
    """Cache that `model.generate` should use, such as `static`. Sampling then goes through `model.generate`."""

    rollout_batch_size: int = 64
    """Most completions that are decoded at the same time. Lower it when sampling runs out of memory; it does not change
    what is sampled."""

    cuda_graphs: bool = True
    """On a GPU, the built-in engine replays its steps as CUDA graphs. Keys and values of as many completions as it
    decodes at a time then stay in memory while training; turn it off where memory is short."""

    compile_sampling: bool = True
    """On a GPU, the built-in engine compiles the layers of the steps that it replays as CUDA graphs (`torch.compile`).
    A step is then a third of the kernels; the first steps of a run wait for the compiler, which is logged. What cannot
    be compiled is sampled as it is. Without `cuda_graphs` nothing is compiled."""

    max_staleness: int = 0
    """Steps that completions may be behind the weights that are trained on them. With 1 or more, the next steps are
    scored while the present one is trained on (and sampled, with a server of vLLM); 0 waits, so that all training is
    on-policy."""

    sync_check_steps: int = 100
    """Steps between two checks that a sampler with weights of its own (vLLM) has the trainer's weights. The first check
    is always made; 0: no others."""

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt, or ``None`` where nothing limits it."""
        by_total = None if self.max_length is None else self.max_length - self.max_new_tokens
        limits = [limit for limit in (self.max_prompt_length, by_total) if limit is not None]
        return min(limits) if limits else None


def check_sampling(args: SamplingFields) -> None:
    """Check how completions are sampled.

    Raises:
        ValueError: a number is out of range, or no tokens are left for the prompt.
    """
    given: dict[str, Any] = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    values = {name: given.get(name, getattr(args, name)) for name in SAMPLING_FIELDS}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ValueError(f"`{name}` must be a number; it is {value!r}.")
    checks = [
        (args.num_completions >= 2, "num_completions", "at least 2: a pair needs two completions"),
        (args.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
        (args.max_prompt_length is None or args.max_prompt_length >= 1, "max_prompt_length", "at least 1"),
        (values["temperature"] > 0, "temperature", "above 0: completions of one prompt have to differ"),
        (0 < values["top_p"] <= 1, "top_p", "in (0, 1]"),
        (values["top_k"] >= 0, "top_k", "0 (off) or more"),
        (values["min_p"] is None or 0 <= values["min_p"] <= 1, "min_p", "in [0, 1]"),
        (values["repetition_penalty"] > 0, "repetition_penalty", "above 0"),
        (args.rollout_batch_size >= 1, "rollout_batch_size", "at least 1"),
        (args.max_staleness >= 0, "max_staleness", "0 or more"),
        (args.sync_check_steps >= 0, "sync_check_steps", "0 or more"),
    ]
    check_numbers(args, checks, values)
    counts = ("num_completions", "max_new_tokens", "max_length")
    for name, problem in absurd({**values, **{name: getattr(args, name) for name in counts}}):
        raise ValueError(f"`{name}` {problem}")
    if args.prompt_limit is not None and args.prompt_limit < 1:
        raise ValueError(
            f"`max_length` ({args.max_length}) leaves no room for a prompt beside `max_new_tokens` "
            f"({args.max_new_tokens}). Raise `max_length` or lower `max_new_tokens`."
        )
