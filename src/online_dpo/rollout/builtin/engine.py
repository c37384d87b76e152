"""Sampling with a `transformers` model in process.

Three ways lead to the same completions, token for token: our own decoder, in which the K completions of a prompt share
its keys and values; on a GPU the same with steps of static shapes, replayed as CUDA graphs; and `model.generate`, for
models that our decoder cannot drive and for options that only `generate` knows. All draw through the same functions
with the same random numbers.

Shapes: ``P`` prompts (or groups ``G``), ``K`` completions, ``B = P * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from online_dpo.errors import named_error
from online_dpo.modeling.borrowing import eval_mode, kept_attributes
from online_dpo.modeling.introspection import computing_dtype, logits_alone, unwrapped
from online_dpo.modeling.loading import empty_device_cache
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.tolerance import MOST_ROUNDING, ROUNDING
from online_dpo.rollout.builtin.decoding import Decoder, StepwiseDecoder, can_decode
from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.builtin.sampling import next_tokens, token_logprobs
from online_dpo.rollout.builtin.static_decoding import StaticBuffers, StaticDecoder, can_be_static
from online_dpo.rollout.completion_text import completion_texts
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)

COMPACT_BELOW = 0.75
TRIAL_TOKENS = 8
LOOK_EVERY = {"cpu": 1}  # tokens after which it is asked who has ended; on a GPU the question stops the queue
LOOK_EVERY_ELSEWHERE = 8
STATIC, DYNAMIC, GENERATE = "static", "dynamic", "generate"
SLOWER = {DYNAMIC: "steps without CUDA graphs", GENERATE: "the `generate` of the model"}


class TransformersEngine:
    """Samples from the live model, so its weights are always the latest.

    Args:
        model: the policy, or a PEFT model around it; used in eval mode, left in the mode it was in.
        tokenizer: decodes completions and finds stop strings.
        batch_size: most completions decoded at the same time.
        version: policy version of the weights, until `sync` says another.
        static_steps: decode in steps of static shapes, which a GPU replays as CUDA graphs; by default, on a GPU. They
            keep memory between calls; see `release`.
    """

    has_own_weights = False
    overlaps = False
    own_dtype: torch.dtype | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        version: int = 0,
        static_steps: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.version = version
        self.static_steps = static_steps
        self._way: str | None = None if can_decode(model) else GENERATE
        self._buffers = StaticBuffers()

    def sync(self, model: nn.Module, version: int) -> None:
        """The weights are the model's own; only the version is new."""
        assert unwrapped(model) is unwrapped(self.model)
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """K completions for each prompt, in the prompts' order."""
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        groups: dict[int, Group] = {}
        with eval_mode(self.model), ExitStack() as stack:
            if self._way is None and prompts:
                self._way = self._find_way([prompts[i] for i in {waiting[0], waiting[-1]}], params, key)
            stack.enter_context(self._fast_linears())
            while waiting:
                chosen = waiting[: max(1, self.batch_size // num_completions)]
                batch = _Batch([prompts[i] for i in chosen], num_completions, params, key, self._device)
                way, fits = GENERATE if params.extra else self._way, False
                with suppress(torch.OutOfMemoryError):
                    self._sample(batch, way, self._buffers)
                    fits = True
                if not fits:  # outside the handler, whose traceback would keep the memory alive
                    self._need_less(len(chosen), num_completions)
                    continue
                groups.update(zip(chosen, batch.groups(self.tokenizer, self.version), strict=True))
                waiting = waiting[len(chosen) :]
        return [groups[i] for i in range(len(prompts))]

    def _find_way(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> str:
        """The fastest way that is right for this model."""
        static = self._device.type == "cuda" if self.static_steps is None else self.static_steps
        ways = [STATIC, DYNAMIC, GENERATE] if static and can_be_static(self.model) else [DYNAMIC, GENERATE]
        why = None
        while ways[0] != GENERATE and (wrong := self._why_not(ways[0], prompts, params, key)) is not None:
            why = wrong
            del ways[0]
        if why is not None:
            logger.warning("Sampling takes a slower path, %s: %s.", SLOWER[ways[0]], why)
        return ways[0]

    def _why_not(self, way: str, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> str | None:
        """Tries whether a few tokens get the log-probabilities that the model gives their whole sequences."""
        few = replace(params, max_new_tokens=min(TRIAL_TOKENS, params.max_new_tokens), end_token_ids=())
        batch = _Batch(prompts, 2, few, key, self._device)
        try:
            with self._fast_linears():
                self._sample(batch, way, StaticBuffers())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an unknown model does with such a forward pass
            return f"it fails with {named_error(error)}"
        completions = [(g.prompt, c) for g in batch.groups(self.tokenizer, 0) for c in g.completions]
        found = max(self._difference(prompt, completion) for prompt, completion in completions)
        allowed = MOST_ROUNDING * ROUNDING[computing_dtype(self.model)]
        if found <= allowed:
            return None
        return f"log-probabilities differ by {found:.1e} a token, where {allowed:.1e} could be rounding"

    def _need_less(self, prompts_at_once: int, num_completions: int) -> None:
        """After running out of memory: half as many prompts at a time from now on; with a single one, no steps that
        keep memory for the longest completions. What is sampled stays the same.
        """
        self.release()
        if prompts_at_once == 1 and self._way == STATIC:
            self._way = DYNAMIC
            logger.warning("Sampling ran out of memory; it goes on with %s.", SLOWER[DYNAMIC])
            return
        if prompts_at_once == 1:
            raise torch.OutOfMemoryError(
                f"{num_completions} completions of one prompt do not fit in memory. Lower `num_completions`, "
                "`max_new_tokens` or `max_length`."
            )
        self.batch_size = max(1, prompts_at_once // 2) * num_completions
        logger.warning("Sampling ran out of memory; decoding %d completions at a time from now on.", self.batch_size)

    def release(self) -> None:
        """Give back the memory that static steps keep between calls: keys, values, graphs. The next one begins anew."""
        self._buffers.release()
        empty_device_cache()

    def close(self) -> None:
        """The model belongs to the trainer and stays."""
        self._buffers.release()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _fast_linears(self) -> AbstractContextManager[None]:
        return onednn_linears(self.model, pack=True)

    def _decoder(self, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int) -> StepwiseDecoder:
        return Decoder(self.model, prompts, num_completions, max_new_tokens)

    def _plain_logits(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """What `_decoder` has to give, by one forward pass over a whole sequence, (1, T, V)."""
        return self.model(input_ids=ids_1T, use_cache=False).logits

    def _difference(self, prompt: Prompt, completion: Completion) -> float:
        """Mean difference, nats a token, of the decoder's log-probabilities to those of a plain forward pass."""
        ids_1T = torch.tensor([[*prompt.token_ids, *completion.token_ids]], device=self._device)
        logits_MV = self._plain_logits(ids_1T)[0, len(prompt.token_ids) - 1 : -1]
        logps_M = token_logprobs(logits_MV, ids_1T[0, len(prompt.token_ids) :])
        return float((logps_M - torch.tensor(completion.logprobs, device=self._device)).abs().mean())

    def _sample(self, batch: _Batch, way: str | None, buffers: StaticBuffers) -> None:
        if way == GENERATE:
            return self._generate(batch)
        of_batch = ([p.token_ids for p in batch.prompts], batch.num_completions, batch.params.max_new_tokens)
        if way == DYNAMIC:
            return self._decode(batch, self._decoder(*of_batch))
        decoder = StaticDecoder(self.model, *of_batch, buffers)
        with buffers.linears.in_use(self.model):
            self._decode(batch, decoder)

    def _decode(self, batch: _Batch, decoder: StepwiseDecoder) -> None:
        """One token at a time for the sequences still running; others leave when that saves a quarter of the work."""
        params, k = batch.params, batch.num_completions
        logits_BV = decoder.prefill().repeat_interleave(k, dim=0)
        rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
        stop_strings = self._stop_strings(params)
        look_every = LOOK_EVERY.get(logits_BV.device.type, LOOK_EVERY_ELSEWHERE)
        batch.prepare(vocabulary=logits_BV.shape[-1])
        token_B, logps_B = next_tokens(logits_BV, logits_BV, *batch.draws(0, rows_B))
        for step in range(params.max_new_tokens):
            batch.write(step, rows_B, token_B, logps_B)
            stopped_B = batch.finish(step, rows_B, token_B, stop_strings)
            if step == params.max_new_tokens - 1:
                return
            if step % look_every == 0:
                running_GK = ~stopped_B.cpu().view(-1, k)
                if not running_GK.any():
                    return
                keep_GK = _worth_keeping(running_GK, decoder.rows)
                if keep_GK is not None:
                    keep_GK, k = keep_GK.to(rows_B.device), keep_GK.shape[1]
                    rows_B, token_B = rows_B[keep_GK.flatten()], token_B[keep_GK.flatten()]
                    decoder.keep(keep_GK)
            token_B, logps_B = decoder.sample(token_B, *batch.draws(step + 1, rows_B))

    def _generate(self, batch: _Batch) -> None:
        """The same through `model.generate`: greedy search over scores in which our draw is the only token left."""
        params = batch.params
        prompts = [prompt.token_ids for prompt in batch.prompts for _ in range(batch.num_completions)]
        ids_BT, mask_BT = _left_padded(prompts, batch.pad_token_id, self._device)
        prompt_length = ids_BT.shape[1]
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        stop_strings = self._stop_strings(params)
        raw: dict[str, torch.Tensor] = {}

        def keep_raw_logits(_module: nn.Module, _args: Any, output: Any) -> None:
            raw["logits_BV"] = output.logits[:, -1]

        def leave_only_our_draw(so_far_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            step = so_far_BT.shape[1] - prompt_length
            batch.prepare(vocabulary=scores_BV.shape[-1])
            token_B, logps_B = next_tokens(scores_BV, raw["logits_BV"], *batch.draws(step, rows_B))
            batch.write(step, rows_B, token_B, logps_B)
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
        with self._generating(keep_raw_logits) as model:
            model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=generation_config,
                logits_processor=LogitsProcessorList([leave_only_our_draw]),
                stopping_criteria=StoppingCriteriaList([finished]),
                **logits_alone(model),
            )

    @contextmanager
    def _generating(self, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[Any]:
        """The model for its own `generate`, with a hook after each forward pass, and without a generation config of its
        own, which would fill gaps in ours.
        """
        model: Any = self.model
        base = unwrapped(model)
        with ExitStack() as stack:
            stack.enter_context(kept_attributes(base, "generation_config"))
            if base is not model:  # PEFT hands on its own, and leaves it behind
                stack.enter_context(kept_attributes(model.base_model, "prepare_inputs_for_generation"))
            base.generation_config = GenerationConfig()
            stack.callback(base.register_forward_hook(hook).remove)
            yield model

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
        self.pad_token_id = 0  # any id will do: padding is masked out
        size, steps = len(prompts) * num_completions, params.max_new_tokens
        uniform = [
            uniform_numbers(key, prompt.row, sample, steps)
            for prompt in prompts
            for sample in key.samples(num_completions)
        ]
        self.uniform_BT = torch.stack([torch.from_numpy(numbers) for numbers in uniform]).to(device)
        self.ids_BT = torch.full((size, steps), self.pad_token_id, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros((size, steps), device=device)
        self.length_B = torch.full((size,), steps, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(size, dtype=torch.bool, device=device)
        self._end_ids = torch.tensor(params.end_token_ids, dtype=torch.long, device=device)
        self._seen_BV: torch.Tensor | None = None
        self._true = torch.ones((), dtype=torch.bool, device=device)

    def prepare(self, vocabulary: int) -> None:
        """Before the first token: notes what stands in the prompts, where there is a repetition penalty."""
        if self.params.repetition_penalty == 1.0 or self._seen_BV is not None:
            return
        seen_PV = torch.zeros(len(self.prompts), vocabulary, dtype=torch.bool, device=self.ids_BT.device)
        for p, prompt in enumerate(self.prompts):
            seen_PV[p, list(prompt.token_ids)] = True
        self._seen_BV = seen_PV.repeat_interleave(self.num_completions, dim=0)

    def draws(self, step: int, rows_B: torch.Tensor) -> tuple[torch.Tensor, SamplingParams, torch.Tensor | None]:
        """What the next token of each of ``rows_B`` is drawn with: the last arguments of `next_tokens`."""
        return self.uniform_BT[rows_B, step], self.params, None if self._seen_BV is None else self._seen_BV[rows_B]

    def write(self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, logps_B: torch.Tensor) -> None:
        """The next token of each of ``rows_B``; what comes after a completion's end is not written."""
        stopped_B = self.stopped_B[rows_B]
        self.ids_BT[rows_B, step] = token_B.masked_fill(stopped_B, self.pad_token_id)
        self.logprobs_BT[rows_B, step] = logps_B.masked_fill(stopped_B, 0.0)
        if self._seen_BV is not None:
            self._seen_BV.index_put_((rows_B, token_B), self._true)

    def finish(
        self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, stop_strings: StopStringCriteria | None
    ) -> torch.Tensor:
        """Marks the sequences that ended with this token; returns which of ``rows_B`` have ended by now."""
        ended_B = (token_B[:, None] == self._end_ids).any(dim=1)
        if stop_strings is not None:
            ended_B |= stop_strings(self.ids_BT[rows_B, : step + 1], None)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        before_B = self.stopped_B[rows_B]
        self.length_B[rows_B] = self.length_B[rows_B].masked_fill(ended_B & ~before_B, step + 1)
        self.stopped_B[rows_B] = before_B | ended_B
        return before_B | ended_B

    def groups(self, tokenizer: PreTrainedTokenizerBase, version: int) -> list[Group]:
        lengths, stopped = self.length_B.tolist(), self.stopped_B.tolist()
        ids = [row[:n] for row, n in zip(self.ids_BT.tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(self.logprobs_BT.tolist(), lengths, strict=True)]
        texts = completion_texts(tokenizer, self.prompts, ids)
        completions = [
            Completion(
                token_ids=tuple(ids[b]),
                logprobs=tuple(logprobs[b]),
                finish_reason="stop" if stopped[b] else "length",
                policy_version=version,
                text=texts[b],
            )
            for b in range(len(ids))
        ]
        k = self.num_completions
        return [Group(prompt, tuple(completions[p * k : (p + 1) * k])) for p, prompt in enumerate(self.prompts)]


def _worth_keeping(running_GK: torch.Tensor, rows: Callable[[int, int], int]) -> torch.Tensor | None:
    """Numbers of the sequences to go on with, (G', K'), the running ones of each group first; ``None`` if that saves
    too little. Groups that run keep equally many, so a sequence that has ended may stay with them.

    ``rows`` says how many sequences are computed for so many groups and completions of each.
    """
    counts_G = running_GK.sum(dim=1)
    k, groups = running_GK.shape[1], (counts_G > 0).nonzero()
    if rows(len(groups), int(counts_G.max())) > COMPACT_BELOW * rows(*running_GK.shape):
        return None
    order_GK = running_GK.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts_G.max())]
    return groups * k + order_GK[groups[:, 0]]


def _left_padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids in sequences)
    ids = [[pad_token_id] * (length - len(s)) + list(s) for s in sequences]
    mask = [[0] * (length - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
