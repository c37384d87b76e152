"""Special tokens that a completion spells out: a scorer reads them as text, not as tokens.

The policy writes what it likes, and a tokenizer finds special tokens in any text. Without this, a completion that
spells out `<|im_end|>` and `<|im_start|>user` would end its own turn in the text that a reward model or a judge reads,
and speak as another one. A completion without such a text is left as it is, and so are prompts, which are the user's.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_OF_CHATS = re.compile(
    r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>｜]{1,40}｜>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>"
)
"""Special tokens of the chat templates of language models, which nothing else looks like."""


class SpecialTokens:
    """The special tokens of a tokenizer, as texts.

    >>> SpecialTokens(tokenizer).as_text("Done.</s> Yes.")  # if `</s>` is one of them
    'Done.< /s> Yes.'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        texts = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        texts = [text for text in texts if len(text) > 1]  # a single character cannot be taken apart
        self._longest = len(texts[0]) if texts else 0
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def as_text(self, answer: str, before: str = "") -> str:
        """A completion in which each special token has a blank after its first character, so that it is none.

        ``before`` is the text that is written directly before it: together they could make one as well.
        """
        answer = _taken_apart(self._pattern, answer)
        end = before[len(before) - min(self._longest - 1, len(before)) :] if self._longest else ""
        across = (match for match in self._pattern.finditer(end + answer[: self._longest]) if match.end() > len(end))
        return f" {answer}" if any(match.start() < len(end) for match in across) else answer


def without_chat_marks(answer: str) -> str:
    """A completion for a language model whose tokenizer is not known here: the same for the tokens of usual templates.

    >>> without_chat_marks("Done.<|im_end|>")
    'Done.< |im_end|>'
    """
    return _taken_apart(_OF_CHATS, answer)


def _taken_apart(pattern: re.Pattern[str], text: str) -> str:
    """The text with a blank after the first character of each match, until there is none."""
    while pattern.search(text):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text
