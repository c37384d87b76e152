"""Pairwise judges as scorers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from online_dpo.errors import ScoringError
from online_dpo.scoring.scorer import callable_name, chat_messages, describe, flat_list
from online_dpo.types import Group, Prompt


@runtime_checkable
class Judge(Protocol):
    """TRL's pairwise judge: prompts and pairs of texts in, the index of the better text out (-1: no answer)."""

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> Sequence[int]: ...


class JudgeScorer:
    """Ranks the two completions of each group by a judge.

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
        ScoringError: (when ranking) the judge raised, or returned something that is no list of ranks.
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

    def prefer(self, duels: Sequence[Group]) -> list[float | None]:
        """For each duel 1 or 0, whether the first completion is the better one; ``None`` without an answer."""
        probability = {0: 1.0, 1: 0.0, -1: None}
        return [probability[rank] for rank in self.rank(duels)]

    def rank(self, groups: Sequence[Group]) -> list[int]:
        """For each group the index of the better completion, or -1."""
        for group in groups:
            if len(group.completions) != 2:
                raise ValueError(
                    f"A judge compares two completions, but a group has {len(group.completions)}: see "
                    "`find_preferences`."
                )
        if not groups:
            return []
        prompts = [self._text(group.prompt) for group in groups]
        pairs = [[completion.text for completion in group.completions] for group in groups]
        try:
            returned = self._judge(prompts, pairs, shuffle_order=True)
        except Exception as error:
            raise ScoringError(f"Judge `{self.name}` raised {type(error).__name__}: {error}") from error
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
        text = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **self._chat_template_kwargs,
        )
        assert isinstance(text, str)
        return text
