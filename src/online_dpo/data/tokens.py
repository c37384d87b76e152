"""Tokenises prompts, and truncates on the left those that are too long.

A prompt is truncated once, here, and its content with it: the returned text or messages are those of the tokens, so
that scorers see what the policy has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from online_dpo.data.chat import render
from online_dpo.data.text import UnusablePrompt
from online_dpo.types import Message


def fit_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None, truncate: bool) -> tuple[str, list[int]]:
    """Tokenise a text and truncate both text and ids on the left to ``limit`` tokens.

    Raises:
        UnusablePrompt: the text gives no token, or it is too long and truncation is off.
    """
    ids, kept_first = tokenize_text(tokenizer, text)
    if limit is None or len(ids) <= limit:
        return text, ids
    _check_may_cut(truncate, limit)
    ids = truncate_left(ids, limit, kept_first)
    text_ids = ids[kept_first:] if kept_first < limit else ids
    return _decoded(tokenizer, text_ids), ids


def fit_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template_arguments: Mapping[str, Any],
    limit: int | None,
    truncate: bool,
) -> tuple[list[Message], list[int]]:
    """Tokenise messages with the chat template and remove the oldest content until they fit in ``limit`` tokens.

    Whole turns are removed first, up to the next user message; then the first remaining message loses its beginning. A
    system message stays. Tokens are not simply cut off, since that would destroy the template's own marks.

    Raises:
        UnusablePrompt: the template rejects the messages or renders nothing, or they are too long and truncation is off
            or not possible.
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
    """A message without the first ``count`` tokens of its content."""
    content = message["content"]
    if not isinstance(content, str):
        raise UnusablePrompt("the prompt is too long, and only messages whose content is text can be cut")
    ids = _token_ids(tokenizer, content)
    if len(ids) <= count:
        raise UnusablePrompt("the prompt leaves no room for a completion, even with its first message cut away")
    return {**message, "content": _decoded(tokenizer, ids[count:])}


def _check_may_cut(truncate: bool, limit: int) -> None:
    if not truncate:
        raise UnusablePrompt(
            f"the prompt is longer than {limit} tokens and leaves no room for a completion; "
            "raise `max_length`, or let `truncate_prompts` cut it"
        )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids, with special tokens and without any clean-up."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Tokenise a plain text prompt; returns its ids, and how many at its start truncation keeps (0, or the BOS).

    Tokens that the tokenizer adds before a text (BOS) are kept; a text that begins with the BOS gets no second one.
    Tokens that it adds after a text (EOS, SEP) are removed, since the completion follows.

    Raises:
        UnusablePrompt: the text gives no token.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    # The mask is 1 for tokens that the tokenizer added; a special token written in the text has 0.
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
    """Tokenise messages with the tokenizer's chat template, which also writes the special tokens.

    If the last message is the assistant's, it is left open to be continued; otherwise the generation prompt starts a
    new message.

    Raises:
        UnusablePrompt: the template rejects the messages, or renders nothing.
    """
    ids = _token_ids(tokenizer, render(tokenizer, messages, template_arguments))
    if not ids:
        raise UnusablePrompt("the prompt has no tokens")
    return ids


def truncate_left(ids: list[int], limit: int, kept_first: int) -> list[int]:
    """Keep the last ``limit`` tokens, including the first ``kept_first`` (the BOS) if that leaves room for others.

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
