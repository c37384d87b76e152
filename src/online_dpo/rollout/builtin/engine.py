"""Sampling with the `transformers` model that is trained, in the same process.

There are three decoding paths, which give the same completions, token for token: our own decoder, in which the K
completions of a prompt share its keys and values; on a GPU the same decoder with static shapes, replayed as CUDA
graphs; and `model.generate`, for models that our decoder cannot run and for options that only `generate` has. All of
them draw tokens with the same functions and the same random numbers.

Shapes: ``P`` prompts (or groups ``G``), ``K`` completions, ``B = P * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from online_dpo.distributed.device_memory import Kept, empty_device_cache, free_kept_memory
from online_dpo.distributed.sampling import callable_alone
from online_dpo.distributed.weights import holds_all, is_sharded
from online_dpo.errors import is_out_of_memory, named_error
from online_dpo.modeling.borrowing import eval_mode, kept_attributes
from online_dpo.modeling.introspection import computing_dtype, unwrapped, without_router_logits
from online_dpo.modeling.memory import DoesNotFit, in_memory
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.tolerance import MOST_ROUNDING, ROUNDING
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.rollout.builtin.batch import Batch, left_padded, rows_to_keep
from online_dpo.rollout.builtin.capture import NotCapturableError
from online_dpo.rollout.builtin.decoding import Decoder, StepwiseDecoder, can_decode
from online_dpo.rollout.builtin.sampling import next_tokens, token_logprobs
from online_dpo.rollout.builtin.static_decoding import StaticBuffers, StaticDecoder, can_be_static
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.runs import events
from online_dpo.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)

TRIAL_TOKENS = 8
CHECK_EVERY = {"cpu": 1}
CHECK_EVERY_ELSEWHERE = 8
"""Tokens between two checks for finished sequences. On a GPU a check waits for all kernels that are queued."""
STATIC, DYNAMIC, GENERATE = "static", "dynamic", "generate"
PATH_NAMES = {DYNAMIC: "steps without CUDA graphs", GENERATE: "the `generate` of the model"}


class TransformersEngine:
    """Samples from the model that is trained, so its weights are always the latest.

    Args:
        model: the policy, or a PEFT model around it; used in eval mode and returned to the mode it was in.
        tokenizer: decodes completions and finds stop strings.
        batch_size: the largest number of completions that are decoded at the same time.
        version: the policy version of the weights, until `sync` sets another.
        static_steps: decode with static shapes, which a GPU replays as CUDA graphs; by default on a GPU only. This
            keeps memory between calls; see `release`.
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
        self._path: str | None = None if can_decode(model) else GENERATE
        self._buffers = StaticBuffers()
        self._spares_memory = False
        self._kept = Kept(self._buffers.release)

    def sync(self, model: nn.Module, version: int) -> None:
        """Sets the policy version of later completions. The weights are the model's own, so nothing is copied."""
        assert unwrapped(model) is unwrapped(self.model)
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """Samples K completions for each prompt; returns the groups in the prompts' order."""
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))  # by length: little padding
        groups: dict[int, Group] = {}
        with self._kept.in_use(), eval_mode(self.model), self._callable_alone(), ExitStack() as stack:
            if self._path is None and prompts:
                self._path = self._choose_path([prompts[i] for i in {waiting[0], waiting[-1]}], params, key)
            stack.enter_context(self._fast_linears())
            while waiting:
                chosen = waiting[: max(1, self.batch_size // num_completions)]
                batch = Batch([prompts[i] for i in chosen], num_completions, params, key, self._device)
                path = GENERATE if params.extra else self._path_now()
                try:
                    with in_memory() as attempt:
                        self._sample(batch, path, self._buffers)
                except NotCapturableError as error:
                    self._leave_graphs(error)
                    continue
                if not attempt.fits:
                    stack.close()  # copies of weights, and memory for them, as it is decided now
                    self._reduce_memory(len(chosen), num_completions)
                    stack.enter_context(self._fast_linears())
                    continue
                groups.update(zip(chosen, batch.groups(self.tokenizer, self.version), strict=True))
                waiting = waiting[len(chosen) :]
        return [groups[i] for i in range(len(prompts))]

    def _choose_path(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> str:
        """The fastest path that gives the right log-probabilities with this model. Warns if it is not the first."""
        static = self._device.type == "cuda" if self.static_steps is None else self.static_steps
        paths = (
            [STATIC, DYNAMIC, GENERATE]
            if static and holds_all(self.model) and can_be_static(self.model)
            else [DYNAMIC, GENERATE]
        )
        reason = None
        while paths[0] != GENERATE and (problem := self._why_wrong(paths[0], prompts, params, key)) is not None:
            reason = problem
            del paths[0]
        if reason is not None:
            logger.warning("Sampling takes a slower path, %s: %s.", PATH_NAMES[paths[0]], reason)
        return paths[0]

    def _path_now(self) -> str | None:
        """The path that was chosen; graphs hold addresses of weights, which must be whole for them."""
        return DYNAMIC if self._path == STATIC and not holds_all(self.model) else self._path

    def _why_wrong(self, path: str, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> str | None:
        """What is wrong with a path; ``None`` if nothing.

        A few tokens are sampled, and their log-probabilities compared with those of a plain forward pass. Where memory
        runs out, the longest prompt is tried alone.

        Raises:
            DoesNotFit: two completions of one prompt do not fit, in the path that needs the least memory.
        """
        with in_memory() as attempt:
            return self._trial(path, prompts, params, key)
        assert not attempt.fits
        self._free_everything()
        if len(prompts) > 1:
            return self._why_wrong(path, prompts[-1:], params, key)
        if path == STATIC:
            return "it runs out of memory"
        raise self._does_not_fit(2)

    def _trial(self, path: str, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> str | None:
        short = replace(params, max_new_tokens=min(TRIAL_TOKENS, params.max_new_tokens), end_token_ids=())
        batch = Batch(prompts, 2, short, key, self._device)
        try:
            with self._fast_linears():
                self._sample(batch, path, StaticBuffers())
        except Exception as error:  # the model's code is unknown, so any exception means that this path cannot be used
            if is_out_of_memory(error):
                raise
            return f"it fails with {named_error(error)}"
        completions = [(g.prompt, c) for g in batch.groups(self.tokenizer, 0) for c in g.completions]
        difference = max(self._difference(prompt, completion) for prompt, completion in completions)
        allowed = MOST_ROUNDING * ROUNDING[computing_dtype(self.model)]
        if difference <= allowed:
            return None
        return f"log-probabilities differ by {difference:.1e} a token, where {allowed:.1e} could be rounding"

    def _leave_graphs(self, error: Exception) -> None:
        """Goes on without graphs from now on; the samples stay the same."""
        self._buffers.release()
        self._path = DYNAMIC
        events.warn(logger, "warning", f"Sampling takes a slower path, {PATH_NAMES[DYNAMIC]}: {error}.")

    def _reduce_memory(self, prompts_at_once: int, num_completions: int) -> None:
        """Lowers the use of memory after an out-of-memory error: from now on half as many prompts at a time, or, if it
        was one prompt, no static steps, which reserve slots for the longest completions, and no copies of weights. The
        samples stay the same.

        Raises:
            DoesNotFit: nothing is left to lower.
        """
        self._free_everything()
        if prompts_at_once == 1 and self._path == STATIC:
            self._path, self._spares_memory = DYNAMIC, True
            events.warn(logger, "out_of_memory", f"Sampling ran out of memory; it goes on with {PATH_NAMES[DYNAMIC]}.")
            return
        if prompts_at_once == 1 and self._holds_copies:
            self._spares_memory = True
            events.warn(logger, "out_of_memory", "Sampling ran out of memory; it goes on without copies of weights.")
            return
        if prompts_at_once == 1:
            raise self._does_not_fit(num_completions)
        self.batch_size = max(1, prompts_at_once // 2) * num_completions
        text = f"Sampling ran out of memory; decoding {self.batch_size} completions at a time from now on."
        events.warn(logger, "out_of_memory", text, completions=self.batch_size)

    def _does_not_fit(self, num_completions: int) -> DoesNotFit:
        return DoesNotFit(
            f"{num_completions} completions of one prompt do not fit in memory. Lower `num_completions`, "
            "`max_new_tokens` or `max_length`."
        )

    def _free_everything(self) -> None:
        self._buffers.release()
        free_kept_memory()

    def release(self) -> None:
        """Frees the memory that static steps keep between calls: the key/value cache, copies of weights, the graphs."""
        self._kept.give_back()
        empty_device_cache()

    def close(self) -> None:
        """Frees the memory of static steps. The model belongs to the trainer and stays."""
        self._buffers.release()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _callable_alone(self) -> AbstractContextManager[None]:
        """Inside, this rank may call the model although others have finished, or have more to sample."""
        return callable_alone(self.model, self._device)

    @property
    def _copies_linears(self) -> bool:
        """Whether steps multiply with `LinearCopies`: on a GPU, and with static steps, while there is memory."""
        return not self._spares_memory and (self._device.type == "cuda" or bool(self.static_steps))

    @property
    def _holds_copies(self) -> bool:
        """Whether copies of weights are held while sampling, of whichever kind, that it could do without."""
        return not self._spares_memory and (self._copies_linears or torch.is_autocast_enabled(self._device.type))

    @property
    def _models(self) -> Sequence[nn.Module]:
        """The models that are called for a token."""
        return [self.model]

    @contextmanager
    def _fast_linears(self) -> Iterator[None]:
        """Inside, a call's weights are cast once, and linear layers are prepared for many small products: copied to
        `LinearCopies`, or packed by oneDNN on a CPU.
        """
        with ExitStack() as stack:
            if not self._spares_memory:
                stack.enter_context(weights_cast_once(*self._models))
            if self._copies_linears:
                stack.enter_context(self._buffers.linears.one_call())
            else:
                for model in self._models:
                    stack.enter_context(onednn_linears(model, pack=True))
            yield

    def _decoder(self, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int) -> StepwiseDecoder:
        return Decoder(self.model, prompts, num_completions, max_new_tokens)

    def _plain_logits(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """Logits of a whole sequence by one plain forward pass, (1, T, V): what the decoder is compared with."""
        return self.model(input_ids=ids_1T, use_cache=False).logits

    def _difference(self, prompt: Prompt, completion: Completion) -> float:
        """Mean absolute difference, in nats per token, between the sampled log-probabilities and those of a plain
        forward pass.
        """
        ids_1T = torch.tensor([[*prompt.token_ids, *completion.token_ids]], device=self._device)
        logits_MV = self._plain_logits(ids_1T)[0, len(prompt.token_ids) - 1 : -1]
        logps_M = token_logprobs(logits_MV, ids_1T[0, len(prompt.token_ids) :])
        return float((logps_M - torch.tensor(completion.logprobs, device=self._device)).abs().mean())

    def _sample(self, batch: Batch, path: str | None, buffers: StaticBuffers) -> None:
        """Samples the batch along one path, into the batch."""
        # The weights of a sharded model are elsewhere in each call, and copies of all of them stay between calls.
        copies = self._copies_linears and (path == STATIC or not is_sharded(self.model))
        with buffers.linears.in_use(self.model) if copies else nullcontext():
            if path == GENERATE:
                return self._generate(batch)
            sizes = ([p.token_ids for p in batch.prompts], batch.num_completions, batch.params.max_new_tokens)
            static = path == STATIC
            self._decode(batch, StaticDecoder(self.model, *sizes, buffers) if static else self._decoder(*sizes))

    def _decode(self, batch: Batch, decoder: StepwiseDecoder) -> None:
        """Samples with a decoder, one token of each running sequence in a step.

        Finished sequences are dropped only when that saves a quarter of a step's work, since it copies the cache.
        """
        params, k = batch.params, batch.num_completions
        logits_BV = decoder.prefill().repeat_interleave(k, dim=0)
        rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
        stop_strings = self._stop_strings(params)
        check_every = CHECK_EVERY.get(logits_BV.device.type, CHECK_EVERY_ELSEWHERE)
        batch.note_prompt_tokens(vocabulary=logits_BV.shape[-1])
        token_B, logps_B = next_tokens(logits_BV, logits_BV, *batch.draw_arguments(0, rows_B))
        for step in range(params.max_new_tokens):
            batch.write(step, rows_B, token_B, logps_B)
            stopped_B = batch.mark_finished(step, rows_B, token_B, stop_strings)
            if step == params.max_new_tokens - 1:
                return
            if step % check_every == 0:
                running_GK = ~stopped_B.cpu().view(-1, k)
                if not running_GK.any():
                    return
                keep_GK = rows_to_keep(running_GK, decoder.rows)
                if keep_GK is not None:
                    keep_GK, k = keep_GK.to(rows_B.device), keep_GK.shape[1]
                    rows_B, token_B = rows_B[keep_GK.flatten()], token_B[keep_GK.flatten()]
                    decoder.keep_only(keep_GK)
            token_B, logps_B = decoder.sample(token_B, *batch.draw_arguments(step + 1, rows_B))

    def _generate(self, batch: Batch) -> None:
        """Samples with `model.generate`.

        Tokens are drawn by our own functions in a logits processor, which leaves the drawn token as the only possible
        one; greedy search then takes it. So the samples are those of the other paths.
        """
        prompts = [prompt.token_ids for prompt in batch.prompts for _ in range(batch.num_completions)]
        ids_BT, mask_BT = left_padded(prompts, batch.pad_token_id, self._device)
        prompt_length = ids_BT.shape[1]
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        stop_strings = self._stop_strings(batch.params)
        raw: dict[str, torch.Tensor] = {}

        def keep_raw_logits(_module: nn.Module, _args: Any, output: Any) -> None:
            raw["logits_BV"] = output.logits[:, -1]  # before the logits processors

        def leave_only_our_draw(so_far_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            step = so_far_BT.shape[1] - prompt_length
            batch.note_prompt_tokens(vocabulary=scores_BV.shape[-1])
            token_B, logps_B = next_tokens(scores_BV, raw["logits_BV"], *batch.draw_arguments(step, rows_B))
            batch.write(step, rows_B, token_B, logps_B)
            return torch.full_like(scores_BV, float("-inf")).scatter_(-1, token_B[:, None], 0.0)

        def finished(so_far_BT: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
            return batch.mark_finished(so_far_BT.shape[1] - prompt_length - 1, rows_B, so_far_BT[:, -1], stop_strings)

        with self._generating(keep_raw_logits) as model:
            model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=_greedy_config(batch.params, batch.pad_token_id),
                logits_processor=LogitsProcessorList([leave_only_our_draw]),
                stopping_criteria=StoppingCriteriaList([finished]),
                **without_router_logits(model),
            )

    @contextmanager
    def _generating(self, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[Any]:
        """The model, ready for its own `generate`: with a hook after each forward pass, and without its generation
        config, from which `generate` would take every option that ours leaves unset.
        """
        model: Any = self.model
        base = unwrapped(model)
        with ExitStack() as stack:
            stack.enter_context(kept_attributes(base, "generation_config"))
            if base is not model:  # PEFT's `generate` replaces this method and does not restore it
                stack.enter_context(kept_attributes(model.base_model, "prepare_inputs_for_generation"))
            base.generation_config = GenerationConfig()
            stack.callback(base.register_forward_hook(hook).remove)
            yield model

    def _stop_strings(self, params: SamplingParams) -> StopStringCriteria | None:
        return StopStringCriteria(self.tokenizer, list(params.stop_strings)) if params.stop_strings else None


def _greedy_config(params: SamplingParams, pad_token_id: int) -> GenerationConfig:
    """The generation config for greedy search with the options that only `generate` has."""
    return GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(params.end_token_ids),
        pad_token_id=pad_token_id,
        **params.extra,
    )
