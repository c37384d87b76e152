"""Sampling with a `transformers` model in process.

Two ways lead to the same completions, token for token: our own decoding loop, which prefills each prompt once and fans
its cache out to the K completions, and `model.generate`, for models whose cache the loop cannot drive and for options
that only `generate` knows. Both draw through the same functions with the same random numbers.

Shapes: ``P`` prompts, ``B = P * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from online_dpo.models import accepts_argument, empty_device_cache, eval_mode, unwrapped
from online_dpo.rollout.engine import RolloutKey, SamplingParams
from online_dpo.rollout.sampling import draw_tokens, reshape_logits, token_logprobs, uniform_numbers
from online_dpo.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
COMPACT_BELOW = 0.75


class TransformersEngine:
    """Samples from the live model, so its weights are always the latest.

    Args:
        model: the policy, or a PEFT model around it; used in eval mode, left in the mode it was in.
        tokenizer: decodes completions and finds stop strings.
        batch_size: most completions decoded at the same time.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._own_loop = _has_plain_cache(model)
        self._takes_positions = accepts_argument(model, "position_ids")
        self._keep_last = {"logits_to_keep": 1} if accepts_argument(model, "logits_to_keep") else {}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """K completions for each prompt, in the prompts' order."""
        decode = self._decode if self._own_loop and not params.extra else self._decode_with_generate
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        groups: dict[int, Group] = {}
        with eval_mode(self.model):
            while waiting:
                chosen = waiting[: max(1, self.batch_size // num_completions)]
                batch = _Batch([prompts[i] for i in chosen], num_completions, params, key, self._device)
                fits = False
                with suppress(torch.OutOfMemoryError):
                    decode(batch)
                    fits = True
                if not fits:  # outside the handler, whose traceback would keep the cache alive
                    self._halve_batch(len(chosen), num_completions)
                    continue
                groups.update(zip(chosen, batch.groups(self.tokenizer), strict=True))
                waiting = waiting[len(chosen) :]
        return [groups[i] for i in range(len(prompts))]

    def _halve_batch(self, prompts_at_once: int, num_completions: int) -> None:
        """After running out of memory: half as many prompts at a time from now on. What is sampled stays the same."""
        if prompts_at_once == 1:
            raise torch.OutOfMemoryError(
                f"{num_completions} completions of one prompt do not fit in memory. Lower `num_completions`, "
                "`max_new_tokens` or `max_length`."
            )
        self.batch_size = max(1, prompts_at_once // 2) * num_completions
        logger.warning("Sampling ran out of memory; decoding %d completions at a time from now on.", self.batch_size)
        empty_device_cache()

    def close(self) -> None:
        """Nothing to release: the model belongs to the trainer."""

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _decode(self, batch: _Batch) -> None:
        """Prefill each prompt once, copy its cache K times, then one token at a time for the sequences still
        running.
        """
        cache = DynamicCache(config=unwrapped(self.model).config.get_text_config())  # pyright: ignore
        ids_PT, mask_PT = batch.prompt_ids_PT, batch.prompt_mask_PT
        logits_PV = self._forward(ids_PT, mask_PT, _positions(mask_PT), cache)
        cache.batch_repeat_interleave(batch.num_completions)
        logits_BV = logits_PV.repeat_interleave(batch.num_completions, dim=0)
        mask_BT = mask_PT.repeat_interleave(batch.num_completions, dim=0)
        rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
        stop_strings = self._stop_strings(batch.params)
        for step in range(batch.params.max_new_tokens):
            token_B = batch.draw(step, rows_B, logits_BV, logits_BV)
            done_B = batch.finish(step, rows_B, token_B, stop_strings)
            if done_B.all() or step == batch.params.max_new_tokens - 1:
                return
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            running_B = ~done_B
            if running_B.sum() <= COMPACT_BELOW * len(rows_B):
                keep = running_B.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                rows_B, token_B, mask_BT = rows_B[keep], token_B[keep], mask_BT[keep]
            logits_BV = self._forward(token_B[:, None], mask_BT, mask_BT.sum(dim=1, keepdim=True) - 1, cache)

    def _forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits of the last position, (B, V)."""
        optional: dict[str, Any] = {**self._keep_last}
        if self._takes_positions:
            optional["position_ids"] = positions_BT
        output = self.model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **optional)
        return output.logits[:, -1]

    def _decode_with_generate(self, batch: _Batch) -> None:
        """The same through `model.generate`: greedy search over scores in which our draw is the only token left."""
        params = batch.params
        ids_BT = batch.prompt_ids_PT.repeat_interleave(batch.num_completions, dim=0)
        mask_BT = batch.prompt_mask_PT.repeat_interleave(batch.num_completions, dim=0)
        prompt_length = ids_BT.shape[1]
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        stop_strings = self._stop_strings(params)
        raw: dict[str, torch.Tensor] = {}

        def keep_raw_logits(_module: nn.Module, _args: Any, output: Any) -> None:
            raw["logits_BV"] = output.logits[:, -1]

        def leave_only_our_draw(so_far_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            token_B = batch.draw(so_far_BT.shape[1] - prompt_length, rows_B, scores_BV, raw["logits_BV"])
            return torch.full_like(scores_BV, float("-inf")).scatter_(-1, token_B[:, None], 0.0)

        def finished(so_far_BT: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
            return batch.finish(so_far_BT.shape[1] - prompt_length - 1, rows_B, so_far_BT[:, -1], stop_strings)

        generation_config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(params.end_token_ids),
            pad_token_id=batch.pad_token_id,
            **params.extra,
        )
        base = unwrapped(self.model)
        own_config, base.generation_config = base.generation_config, GenerationConfig()  # it would fill gaps in ours
        hook = base.register_forward_hook(keep_raw_logits)
        try:
            self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=generation_config,
                logits_processor=LogitsProcessorList([leave_only_our_draw]),  # pyright: ignore[reportArgumentType]
                stopping_criteria=StoppingCriteriaList([finished]),  # pyright: ignore[reportArgumentType]
            )
        finally:
            hook.remove()
            base.generation_config = own_config

    def _stop_strings(self, params: SamplingParams) -> StopStringCriteria | None:
        return StopStringCriteria(self.tokenizer, list(params.stop_strings)) if params.stop_strings else None


class _Batch:
    """The sequences that are decoded together, and what has been sampled of them so far."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_completions: int,
        params: SamplingParams,
        key: RolloutKey,
        device: torch.device,
    ) -> None:
        self.prompts, self.num_completions, self.params, self.key = prompts, num_completions, params, key
        self.pad_token_id = params.end_token_ids[0]  # any id will do: padding is masked out
        self.prompt_ids_PT, self.prompt_mask_PT = _left_padded(
            [p.token_ids for p in prompts], self.pad_token_id, device
        )
        size, steps = len(prompts) * num_completions, params.max_new_tokens
        uniform = [
            uniform_numbers(key, prompt.row, sample, steps) for prompt in prompts for sample in range(num_completions)
        ]
        self.uniform_BT = torch.stack([torch.from_numpy(numbers) for numbers in uniform]).to(device)
        self.ids_BT = torch.full((size, steps), self.pad_token_id, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros((size, steps), device=device)
        self.length_B = torch.full((size,), steps, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(size, dtype=torch.bool, device=device)
        self._end_ids = torch.tensor(params.end_token_ids, device=device)
        self._seen_BV: torch.Tensor | None = None

    def draw(
        self, step: int, rows_B: torch.Tensor, scores_BV: torch.Tensor, raw_logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """The next token of each of ``rows_B``; ``scores_BV`` are the logits after any processor, ``raw_logits_BV``
        before.
        """
        seen_BV = self._seen(rows_B, scores_BV.shape[-1]) if self.params.repetition_penalty != 1.0 else None
        logits_BV = reshape_logits(scores_BV.float(), self.params, seen_BV)
        token_B = draw_tokens(logits_BV, self.uniform_BT[rows_B, step])
        running_B = ~self.stopped_B[rows_B]
        self.ids_BT[rows_B, step] = torch.where(running_B, token_B, self.pad_token_id)
        self.logprobs_BT[rows_B, step] = torch.where(running_B, token_logprobs(raw_logits_BV, token_B), 0.0)
        if self._seen_BV is not None:
            self._seen_BV[rows_B, token_B] = True
        return token_B

    def finish(
        self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, stop_strings: StopStringCriteria | None
    ) -> torch.Tensor:
        """Marks the sequences that ended with this token; returns which of ``rows_B`` have ended by now."""
        ended_B = torch.isin(token_B, self._end_ids)
        if stop_strings is not None:
            ended_B |= stop_strings(self.ids_BT[rows_B, : step + 1], None)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        newly_B = ended_B & ~self.stopped_B[rows_B]
        self.length_B[rows_B[newly_B]] = step + 1
        self.stopped_B[rows_B[newly_B]] = True
        return self.stopped_B[rows_B]

    def groups(self, tokenizer: PreTrainedTokenizerBase) -> list[Group]:
        lengths, stopped = self.length_B.tolist(), self.stopped_B.tolist()
        ids = [row[:n] for row, n in zip(self.ids_BT.tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(self.logprobs_BT.tolist(), lengths, strict=True)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = [
            Completion(
                token_ids=tuple(ids[b]),
                logprobs=tuple(logprobs[b]),
                finish_reason="stop" if stopped[b] else "length",
                policy_version=self.key.version,
                text=texts[b],
            )
            for b in range(len(ids))
        ]
        k = self.num_completions
        return [Group(prompt, tuple(completions[p * k : (p + 1) * k])) for p, prompt in enumerate(self.prompts)]

    def _seen(self, rows_B: torch.Tensor, vocabulary: int) -> torch.Tensor:
        if self._seen_BV is None:
            seen_PV = torch.zeros(len(self.prompts), vocabulary, dtype=torch.bool, device=rows_B.device)
            for p, prompt in enumerate(self.prompts):
                seen_PV[p, list(prompt.token_ids)] = True
            self._seen_BV = seen_PV.repeat_interleave(self.num_completions, dim=0)
        return self._seen_BV[rows_B]


def _has_plain_cache(model: nn.Module) -> bool:
    """Whether the model's memory is a key-value cache of attention layers only, which can be copied and cut by rows."""
    base = unwrapped(model)
    layers = set(getattr(base.config.get_text_config(), "layer_types", None) or ATTENTION_LAYERS)  # pyright: ignore
    supported = base._supports_default_dynamic_cache()  # pyright: ignore[reportCallIssue]
    return layers <= ATTENTION_LAYERS and not base._is_stateful and supported  # pyright: ignore[reportReturnType]


def _left_padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids in sequences)
    ids = [[pad_token_id] * (length - len(s)) + list(s) for s in sequences]
    mask = [[0] * (length - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _positions(mask_BT: torch.Tensor) -> torch.Tensor:
    return (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
