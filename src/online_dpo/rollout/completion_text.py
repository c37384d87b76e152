"""The text of a completion: its tokens decoded together with those of its prompt.

Decoded alone, the tokens may give another text. The tokenizers of Llama 2 and Mistral strip the space before the first
word of a text, others join pieces of a word across the border between prompt and completion, and the bytes of one
character may be on both sides of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from online_dpo.types import Prompt

CONTEXT_TOKENS = 32
"""The number of a prompt's last tokens that are decoded with each completion, instead of all of its tokens."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]
) -> list[str]:
    """The texts of K completions of each prompt, in order, without special tokens.

    A text is what follows ``decode(prompt)`` in ``decode(prompt + completion)``. If the second does not begin with the
    first (because the first bytes of the completion change the prompt's last character), it is what follows their
    longest common prefix. Spaces are kept as the tokens encode them (no clean-up).

    The answer to a chat is the content of a message. White space that the chat template writes between the generation
    prompt and this content is removed.

    Args:
        tokenizer: the policy's tokenizer.
        prompts: P prompts; ``token_ids`` and the type of ``content`` are used.
        completions: token ids of P x K completions, grouped by prompt.
    """
    if not prompts:
        return []
    k = len(completions) // len(prompts)
    whitespace = _whitespace_before_answer(tokenizer) if any(prompt.is_conversational for prompt in prompts) else ""
    texts: list[str] = []
    for p, prompt in enumerate(prompts):
        decoder = _CompletionDecoder(tokenizer, prompt.token_ids)
        answers = [decoder.text(ids) for ids in completions[p * k : (p + 1) * k]]
        texts += [answer.removeprefix(whitespace) for answer in answers] if _is_new_message(prompt) else answers
    return texts


class _CompletionDecoder:
    """Decodes completions of one prompt, with that prompt before them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = list(prompt_ids)
        self._prompt_text = self._decode(self._prompt_ids)
        self._context_ids = self._prompt_ids[-CONTEXT_TOKENS:]
        self._context_text = self._decode(self._context_ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of one completion.

        Decoding it after the last tokens of the prompt is enough if these give the end of the prompt's text and no
        incomplete bytes remain: decoders treat the beginning of a text in a special way, which is then before the
        completion, and otherwise they change neighbouring tokens only.
        """
        if self._context_text and self._prompt_text.endswith(self._context_text):
            joint = self._decode([*self._context_ids, *ids])
            if joint.startswith(self._context_text) and _REPLACEMENT not in joint:
                return joint[len(self._context_text) :]
        joint = self._decode([*self._prompt_ids, *ids])
        return joint[len(os.path.commonprefix([self._prompt_text, joint])) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _is_new_message(prompt: Prompt) -> bool:
    """Whether the completion is a new message, and does not continue an unfinished one of the assistant."""
    return not isinstance(prompt.content, str) and prompt.content[-1]["role"] != "assistant"


def _whitespace_before_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that the chat template writes between the generation prompt and the content of an answer."""
    if tokenizer.chat_template is None:
        return ""
    chat = [{"role": "user", "content": "question"}]
    try:
        before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        with_answer = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "answer"}], tokenize=False)
    except (TemplateError, ValueError, TypeError):  # the template needs other chats, such as with a system message
        return ""
    assert isinstance(before, str) and isinstance(with_answer, str)
    whitespace, found, _ = with_answer.removeprefix(before).partition("answer")
    return whitespace if found and with_answer.startswith(before) and whitespace.isspace() else ""
