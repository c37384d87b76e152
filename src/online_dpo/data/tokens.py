"""A prompt to its token ids, cut on the left where it is too long.

A prompt is cut once, here, and what it says is cut with it: the text or messages that come back are the ones that the
tokens stand for, so that scorers judge what the policy has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from online_dpo.data.convert import UnusablePrompt
from online_dpo.errors import error_text
from online_dpo.types import Message


def fit_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None, truncate: bool) -> tuple[str, list[int]]:
    """A text and its token ids, both without the left part that goes beyond ``limit`` tokens.

    Raises:
        UnusablePrompt: no token comes from the text, or it is too long and must not be cut.
    """
    ids, kept_first = tokenize_text(tokenizer, text)
    if limit is None or len(ids) <= limit:
        return text, ids
    _check_may_cut(truncate, limit)
    ids = truncate_left(ids, limit, kept_first)
    own = ids[kept_first:] if kept_first < limit else ids
    return _as_written(tokenizer, own), ids


def fit_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template_arguments: Mapping[str, Any],
    limit: int | None,
    truncate: bool,
) -> tuple[list[Message], list[int]]:
    """Messages and their token ids in the chat template, without the oldest turns that go beyond ``limit`` tokens.

    Whole turns leave first, up to the next message of the user; then the first message that is left loses its
    beginning. A system message stays: cutting tokens blindly would tear the template's own marks apart.

    Raises:
        UnusablePrompt: the template refuses the messages or renders nothing, or they are too long and must not or
            cannot be cut.
    """
    ids = tokenize_messages(tokenizer, messages, template_arguments)
    if limit is None or len(ids) <= limit:
        return messages, ids
    _check_may_cut(truncate, limit)
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(ids) > limit and len(turns) > 1:
        later_users = [i for i, message in enumerate(turns) if i > 0 and message["role"] == "user"]
        if not later_users:
            break
        turns = turns[later_users[0] :]
        ids = tokenize_messages(tokenizer, system + turns, template_arguments)
    while turns and len(ids) > limit:
        turns = [_without_beginning(tokenizer, turns[0], len(ids) - limit), *turns[1:]]
        ids = tokenize_messages(tokenizer, system + turns, template_arguments)
    return system + turns, ids


def _without_beginning(tokenizer: PreTrainedTokenizerBase, message: Message, count: int) -> Message:
    """The message without the first ``count`` tokens of its content."""
    content = message["content"]
    if not isinstance(content, str):
        raise UnusablePrompt("the prompt is too long, and only messages whose content is text can be cut")
    ids = _own_tokens(tokenizer, content)
    if len(ids) <= count:
        raise UnusablePrompt("the prompt leaves no room for a completion, even with its first message cut away")
    return {**message, "content": _as_written(tokenizer, ids[count:])}


def _check_may_cut(truncate: bool, limit: int) -> None:
    if not truncate:
        raise UnusablePrompt(
            f"the prompt is longer than {limit} tokens and leaves no room for a completion; "
            "raise `max_length`, or let `truncate_prompts` cut it"
        )


def _as_written(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _own_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids of a plain text prompt, and how many at its start survive truncation (0, or the BOS).

    What the tokenizer itself puts before a text (BOS) stays, once: a text that begins with the BOS gets no second one.
    What it puts after a text (EOS, SEP) is left out, since the completion follows there.

    Raises:
        UnusablePrompt: no token comes from the text.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    # The mask marks what the tokenizer added; a special token written in the text has 0 there.
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    if all(added):
        raise UnusablePrompt("the prompt has no tokens")
    first, last = added.index(0), len(added) - added[::-1].index(0)
    prefix, own = ids[:first], ids[first:last]
    if prefix and own[0] == tokenizer.bos_token_id == prefix[-1]:
        return prefix + own[1:], len(prefix)
    return prefix + own, len(prefix) or _leading_bos(tokenizer, own)


def tokenize_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], template_arguments: Mapping[str, Any]
) -> list[int]:
    """Token ids of messages in the tokenizer's chat template.

    The template writes the special tokens. After a last message of the assistant that message goes on; after any
    other, the generation prompt opens a new one.

    Raises:
        UnusablePrompt: the template refuses the messages, or renders nothing.
    """
    continues = messages[-1]["role"] == "assistant"
    own: dict[str, Any] = {
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        "tokenize": False,
    }
    try:
        text = tokenizer.apply_chat_template(messages, **{**template_arguments, **own})
    except Exception as error:  # a template is a program of the tokenizer's makers
        raise UnusablePrompt(f"the chat template refuses the messages ({error_text(error)})") from None
    assert isinstance(text, str)
    ids = _own_tokens(tokenizer, text)
    if not ids:
        raise UnusablePrompt("the prompt has no tokens")
    return ids


def truncate_left(ids: list[int], limit: int, kept_first: int) -> list[int]:
    """The last ``limit`` tokens; the first ``kept_first`` (the BOS) stay in front if that leaves room for others.

    >>> truncate_left([1, 20, 21, 22, 23], limit=3, kept_first=1)
    [1, 22, 23]
    """
    if len(ids) <= limit:
        return ids
    if kept_first >= limit:
        kept_first = 0
    return ids[:kept_first] + ids[len(ids) - (limit - kept_first) :]


def _leading_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    return int(ids[0] == tokenizer.bos_token_id)
