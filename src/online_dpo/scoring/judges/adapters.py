"""Functions and TRL's judges as judges of this package."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, at_row, callable_name, foreign
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judges.base import NO_ANSWER, Judge, PreferenceJudge
from online_dpo.scoring.protocols import chat_messages, check_comparisons, describe, flat_list
from online_dpo.scoring.rewards.function import is_async_function
from online_dpo.types import Group, Prompt


class FunctionJudge(PreferenceJudge):
    """A Python function, or an object with ``__call__``, that is asked about one pair at a time.

    >>> FunctionJudge(lambda prompt, first, second: len(first) < len(second))

    It is called as ``function(prompt, first, second)`` with the prompt (text, or a list of messages) and two texts, and
    returns the probability that the first one is better, True or False, or ``None`` where it has no answer (nan is none
    as well). An ``async`` function is asked about several pairs at the same time. Which of the two stands first is as
    it comes: a function with a liking for a place should ask for both itself.

    Args:
        function: what to call.
        name: name in metrics; when not given, the function's own.
        concurrency: pairs that an ``async`` function is asked about at the same time.

    Raises:
        TypeError: ``function`` cannot be called with three arguments.
        ValueError: ``concurrency`` is not 1 or more, or (when judging) a group has not two completions.
        ScoringError: (when judging) it raised, or returned no probability. Its own ``FeedbackStopped`` passes through.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, concurrency: int = 16) -> None:
        if not callable(function) or not takes(function, "prompt", "first", "second"):
            raise TypeError(f"A judge function is called as f(prompt, first, second); this is {form_of(function)}.")
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be 1 or more; it is {concurrency}.")
        self.name = name or callable_name(function)
        self._function = function
        self._is_async = is_async_function(function)
        self._room = asyncio.Semaphore(concurrency)  # one for all threads: they share the event loop

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """As :class:`PairwiseScorer` says."""
        check_comparisons(comparisons)
        replies = (
            wait_for(submit(self._ask(comparisons)))
            if self._is_async
            else [self._reply(comparison) for comparison in comparisons]
        )
        return [self._preference(reply) for reply in replies]

    def _reply(self, comparison: Group) -> Any:
        with self._foreign(comparison):
            return self._function(*_texts(comparison))

    def _foreign(self, comparison: Group) -> AbstractContextManager[None]:
        return foreign(f"Judge `{self.name}`", lambda: at_row(comparison.prompt))

    async def _ask(self, comparisons: Sequence[Group]) -> list[Any]:
        async def one(comparison: Group) -> Any:
            async with self._room:
                with self._foreign(comparison):
                    return await self._function(*_texts(comparison))

        waiting = [asyncio.ensure_future(one(comparison)) for comparison in comparisons]
        try:
            return list(await asyncio.gather(*waiting))
        finally:
            for task in waiting:
                task.cancel()

    def _preference(self, reply: Any) -> float | None:
        value = reply.item() if isinstance(reply, (torch.Tensor, np.ndarray, np.generic)) and reply.ndim == 0 else reply
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, numbers.Real) and 0 <= float(value) <= 1:
            return float(value)
        raise ScoringError(
            f"Judge `{self.name}` returned {describe(reply)}. Return the probability that the first text is better, "
            "from 0 to 1, or None."
        )


def takes_lists(function: Callable[..., Any]) -> bool:
    return takes(function, [], [], shuffle_order=True)


def takes(function: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    return True


def _texts(comparison: Group) -> tuple[Any, str, str]:
    first, second = comparison.completions
    return copy.deepcopy(comparison.prompt.content), first.text, second.text  # a function may change messages in place


class JudgeScorer:
    """Ranks the two completions of each group by a judge of TRL's kind, and turns the ranks into preferences.

    Args:
        judge: an object with ``judge(prompts, completion_pairs, shuffle_order=True)``, or a function of that form.
            Prompts are texts, pairs are ``[text 0, text 1]``; it returns 0, 1 or -1 (no answer) for each prompt.
        tokenizer: the policy's. Its chat template renders conversational prompts.
        chat_template_kwargs: passed to that template.
        name: name in metrics; when not given, the judge's class or function name.

    Raises:
        TypeError: ``judge`` is neither.
        ValueError: (when ranking) a group has not two completions, or a prompt is conversational and the tokenizer has
            no chat template.
        ScoringError: (when ranking) the judge raised, or returned something that is no list of ranks. Its own
            ``FeedbackStopped`` passes through.
    """

    def __init__(
        self,
        judge: Judge | Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(judge, Judge):
            self._judge, own_name = judge.judge, type(judge).__name__
        elif callable(judge):
            self._judge, own_name = judge, callable_name(judge)
        else:
            raise TypeError(
                "`judge` must have a method `judge(prompts, completion_pairs, shuffle_order=True)` or be a function of "
                f"that form; this is {describe(judge)}."
            )
        self.name = name or own_name
        self._tokenizer = tokenizer
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """1 where the first completion is the better one, 0 where the second is, ``None`` without an answer."""
        return [None if rank == NO_ANSWER else float(1 - rank) for rank in self.rank(comparisons)]

    def rank(self, groups: Sequence[Group]) -> list[int]:
        """For each group the index of the better completion, or -1."""
        check_comparisons(groups)
        if not groups:
            return []
        prompts = [self._text(group.prompt) for group in groups]
        pairs = [[completion.text for completion in group.completions] for group in groups]
        with foreign(f"Judge `{self.name}`", lambda: among_rows(groups)):
            returned = self._judge(prompts, pairs, shuffle_order=True)
        ranks = flat_list(returned, f"Judge `{self.name}`")
        if len(ranks) != len(groups):
            raise ScoringError(
                f"Judge `{self.name}` returned {len(ranks)} ranks for {len(groups)} prompts. "
                "Return one for each prompt."
            )
        return [self._rank(index, rank) for index, rank in enumerate(ranks)]

    def _rank(self, index: int, rank: Any) -> int:
        if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool) and rank in (-1, 0, 1):
            return int(rank)
        raise ScoringError(
            f"Judge `{self.name}` returned {describe(rank)} at index {index}. A rank is the int 0, 1 or -1 (no answer)."
        )

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt.content, str):
            return prompt.content
        if self._tokenizer.chat_template is None and "chat_template" not in self._chat_template_kwargs:
            raise ScoringError(
                "The policy's tokenizer has no chat template, so conversational prompts cannot be shown to the judge "
                f"`{self.name}`. Set `tokenizer.chat_template`, or use text prompts."
            )
        messages = chat_messages(prompt)
        # A prompt that ends with the assistant's own words is continued, not answered.
        continued = messages[-1]["role"] == "assistant"
        with foreign(f"The chat template that shows prompts to judge `{self.name}`", lambda: at_row(prompt)):
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **self._chat_template_kwargs,
            )
        assert isinstance(text, str)
        return text


def form_of(judge: Any) -> str:
    """A function with its arguments, anything else as it shows itself."""
    if inspect.isfunction(judge):
        return f"the function {judge.__name__}{inspect.signature(judge)}"
    return describe(judge)
