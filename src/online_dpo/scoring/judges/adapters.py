"""Adapters that turn a function, or a judge in TRL's form, into a pairwise scorer."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, at_row, callable_name, foreign
from online_dpo.scoring.accounting import FailureWindow
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judges.base import NO_ANSWER, Judge, PreferenceJudge
from online_dpo.scoring.protocols import as_number, chat_messages, check_comparisons, describe, flat_list
from online_dpo.scoring.questions import keep_questions, texts_of
from online_dpo.scoring.rewards.function import is_async_function
from online_dpo.scoring.time_limit import await_in_time, call_in_time
from online_dpo.types import Group, Prompt, Question

IS_NAN = "its preference is nan"


class FunctionJudge(PreferenceJudge):
    """A judge made of a Python function, or of an object with ``__call__``, which is called with one pair at a time.

    >>> FunctionJudge(lambda prompt, first, second: len(first) < len(second))

    The call is ``function(prompt, first, second)`` with the prompt (text, or a list of messages) and two texts. It
    returns the probability that the first text is better, True or False, or ``None`` (or nan) without an answer. An
    ``async`` function runs for several pairs at the same time. The order of the two texts is arbitrary and each pair is
    asked about once: a function with a position bias should compare both orders itself.

    Args:
        function: the judge function.
        name: name in metrics; by default the function's own name.
        concurrency: pairs that an ``async`` function compares at the same time.
        max_failure_share: the run stops when more than this share of the latest answers is nan.

    Raises:
        TypeError: ``function`` cannot be called with three arguments.
        ValueError: ``concurrency`` is below 1, or (when judging) a group does not have two completions.
        ScoringError: (when judging) the function raised an error, or did not return a probability. A
            ``FeedbackStopped`` of its own passes through.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        concurrency: int = 16,
        max_failure_share: float = 0.2,
    ) -> None:
        if not callable(function) or not takes(function, "prompt", "first", "second"):
            raise TypeError(f"A judge function is called as f(prompt, first, second); this is {form_of(function)}.")
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be 1 or more; it is {concurrency}.")
        self.name = name or callable_name(function)
        self._function = function
        self._failures = FailureWindow(f"Judge `{self.name}`", max_failure_share)
        self._is_async = is_async_function(function)
        self._slots = asyncio.Semaphore(concurrency)  # one for all threads: they share the event loop

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return the function's answer for each group of two completions, as :meth:`PairwiseScorer.prefer`."""
        check_comparisons(comparisons)
        returned = (
            wait_for(submit(self._call_concurrently(comparisons)))
            if self._is_async
            else [self._call(comparison) for comparison in comparisons]
        )
        return [self._kept(comparison, value) for comparison, value in zip(comparisons, returned, strict=True)]

    def _kept(self, comparison: Group, returned: Any) -> float | None:
        """The probability that the function returned, which is told to the record of the run."""
        probability = self._checked_probability(returned)
        failure = None if probability is not None or returned is None else IS_NAN
        keep_questions(texts_of(comparison), [Question(False, probability, failure=failure)])
        return probability

    def _call(self, comparison: Group) -> Any:
        arguments = _arguments(comparison)
        with self._foreign(comparison):
            return call_in_time(lambda: self._function(*arguments), self._label, lambda: at_row(comparison.prompt))

    def _foreign(self, comparison: Group) -> AbstractContextManager[None]:
        return foreign(self._label, lambda: at_row(comparison.prompt))

    @property
    def _label(self) -> str:
        return f"Judge `{self.name}`"

    async def _call_concurrently(self, comparisons: Sequence[Group]) -> list[Any]:
        """Call an ``async`` function for all comparisons. An error of one cancels the others."""

        async def call(comparison: Group) -> Any:
            async with self._slots:
                with self._foreign(comparison):
                    answer = self._function(*_arguments(comparison))
                    return await await_in_time(answer, self._label, lambda: at_row(comparison.prompt))

        tasks = [asyncio.ensure_future(call(comparison)) for comparison in comparisons]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _checked_probability(self, returned: Any) -> float | None:
        is_scalar = isinstance(returned, (torch.Tensor, np.ndarray, np.generic)) and returned.ndim == 0
        value = returned.item() if is_scalar else returned
        if value is None:
            return None
        number = as_number(value)
        if number is not None and math.isnan(number):
            self._failures.add(IS_NAN)
            return None
        if number is not None and 0 <= number <= 1:
            self._failures.add(None)
            return number
        raise ScoringError(
            f"Judge `{self.name}` returned {describe(returned)}. Return the probability that the first text is better, "
            "from 0 to 1, or None."
        )


def takes_lists(function: Callable[..., Any]) -> bool:
    """Whether a function can be called in TRL's form: ``function(prompts, pairs, shuffle_order=True)``."""
    return takes(function, [], [], shuffle_order=True)


def takes(function: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    """Whether a function's signature accepts a call with these arguments."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    return True


def _arguments(comparison: Group) -> tuple[Any, str, str]:
    first, second = comparison.completions
    # A function may change the messages in place: it gets a copy.
    return copy.deepcopy(comparison.prompt.content), first.text, second.text


class JudgeScorer:
    """A judge in TRL's form as a pairwise scorer: its ranks become preferences of 1 or 0.

    Args:
        judge: an object with ``judge(prompts, completion_pairs, shuffle_order=True)``, or a function of that form.
            Prompts are texts, pairs are ``[text 0, text 1]``; it returns 0, 1 or -1 (no answer) for each prompt.
        tokenizer: the policy's tokenizer. Its chat template renders conversational prompts.
        chat_template_kwargs: arguments of that template.
        name: name in metrics; by default the name of the judge's class or function.

    Raises:
        TypeError: ``judge`` is neither such an object nor a function.
        ValueError: (when ranking) a group does not have two completions, or a prompt is conversational and the
            tokenizer has no chat template.
        ScoringError: (when ranking) the judge raised an error, or did not return a list of ranks. A
            ``FeedbackStopped`` of its own passes through.
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
        """Return for each group 1 if its first completion is better, 0 if the second is, ``None`` without an answer."""
        return [None if rank == NO_ANSWER else float(1 - rank) for rank in self.rank(comparisons)]

    def rank(self, groups: Sequence[Group]) -> list[int]:
        """Return for each group the index of the better completion, or -1 without an answer."""
        check_comparisons(groups)
        if not groups:
            return []
        prompts = [self._text(group.prompt) for group in groups]
        pairs = [[completion.text for completion in group.completions] for group in groups]
        who, rows = f"Judge `{self.name}`", functools.partial(among_rows, groups)
        with foreign(who, rows):
            returned = call_in_time(lambda: self._judge(prompts, pairs, shuffle_order=True), who, rows)
        ranks = flat_list(returned, f"Judge `{self.name}`")
        if len(ranks) != len(groups):
            raise ScoringError(
                f"Judge `{self.name}` returned {len(ranks)} ranks for {len(groups)} prompts. "
                "Return one for each prompt."
            )
        return [self._checked_rank(index, rank) for index, rank in enumerate(ranks)]

    def _checked_rank(self, index: int, rank: Any) -> int:
        if isinstance(rank, (int, np.integer)) and not isinstance(rank, bool) and rank in (-1, 0, 1):
            return int(rank)
        raise ScoringError(
            f"Judge `{self.name}` returned {describe(rank)} at index {index}. A rank is the int 0, 1 or -1 (no answer)."
        )

    def _text(self, prompt: Prompt) -> str:
        """The prompt as text; messages are rendered with the chat template."""
        if isinstance(prompt.content, str):
            return prompt.content
        if self._tokenizer.chat_template is None and "chat_template" not in self._chat_template_kwargs:
            raise ScoringError(
                "The policy's tokenizer has no chat template, so conversational prompts cannot be shown to the judge "
                f"`{self.name}`. Set `tokenizer.chat_template`, or use text prompts."
            )
        messages = chat_messages(prompt)
        # If the prompt ends with the beginning of the assistant's answer, the completion continues that message.
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
    """Describe what was given as a judge, for error messages: a function with its signature, else type and value."""
    if inspect.isfunction(judge):
        return f"the function {judge.__name__}{inspect.signature(judge)}"
    return describe(judge)
