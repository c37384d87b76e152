"""What a completion says: its tokens decoded behind those of its prompt, since a decoder reads a part otherwise alone.

Decoders of Llama 2 and Mistral strip the space before a text's first word, others join pieces of a word across the
border, and bytes of one character may stand on both sides of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from online_dpo.types import Prompt

CONTEXT_TOKENS = 32
"""Last tokens of a prompt that are decoded before each completion, instead of all of them."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]
) -> list[str]:
    """The texts of equally many completions of each prompt, in order, without special tokens.

    A text is what ``decode(prompt + completion)`` has behind ``decode(prompt)``. Where the former does not begin with
    the latter (the first bytes of the completion change the prompt's last character), it is what follows their longest
    common beginning. Nothing is cleaned up: spaces are those that the tokens stand for.

    The answer to a chat is the content of a message: white space that the tokenizer's chat template writes before it,
    behind the generation prompt, is not part of it.

    Args:
        tokenizer: the policy's.
        prompts: P prompts; ``token_ids`` and the kind of ``content`` are read.
        completions: token ids of P x K completions, those of one prompt next to each other.
    """
    if not prompts:
        return []
    k = len(completions) // len(prompts)
    opening = _opening(tokenizer) if any(prompt.is_conversational for prompt in prompts) else ""
    texts: list[str] = []
    for p, prompt in enumerate(prompts):
        decoder = _DecoderBehind(tokenizer, prompt.token_ids)
        answers = [decoder.text(ids) for ids in completions[p * k : (p + 1) * k]]
        texts += [answer.removeprefix(opening) for answer in answers] if _opens_message(prompt) else answers
    return texts


class _DecoderBehind:
    """Decodes completions of one prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = list(prompt_ids)
        self._whole = self._decode(self._prompt_ids)
        self._context_ids = self._prompt_ids[-CONTEXT_TOKENS:]
        self._context = self._decode(self._context_ids)

    def text(self, ids: Sequence[int]) -> str:
        """The last tokens of the prompt are enough where they read as they do in the whole of it and no bytes are left
        over: what decoders do to a text's beginning is then done before the completion, and all else they do to
        neighbouring tokens.
        """
        if self._context and self._whole.endswith(self._context):
            joint = self._decode([*self._context_ids, *ids])
            if joint.startswith(self._context) and _BROKEN not in joint:
                return joint[len(self._context) :]
        joint = self._decode([*self._prompt_ids, *ids])
        return joint[len(os.path.commonprefix([self._whole, joint])) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _opens_message(prompt: Prompt) -> bool:
    """Whether the completion is a message of its own, and does not go on with the assistant's last one."""
    return not isinstance(prompt.content, str) and prompt.content[-1]["role"] != "assistant"


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that the chat template writes between the generation prompt and the content of an answer."""
    if tokenizer.chat_template is None:
        return ""
    chat = [{"role": "user", "content": "question"}]
    try:
        before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "answer"}], tokenize=False)
    except (TemplateError, ValueError, TypeError):  # it is for other chats, such as those with a system message
        return ""
    assert isinstance(before, str) and isinstance(whole, str)
    opening, found, _ = whole.removeprefix(before).partition("answer")
    return opening if found and whole.startswith(before) and opening.isspace() else ""
