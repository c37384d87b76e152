"""Messages and chat templates: what a template would drop, rename or print as Python writes it is no usable prompt.

A template is a program of its author, and most of them say nothing about messages that they do not know: a role
``User`` is left out by some and copied by others, and a list of parts becomes ``[{'type': 'text', ...``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from online_dpo.data.template_limits import template_limits
from online_dpo.data.text import UnusablePrompt, check_characters
from online_dpo.errors import error_text
from online_dpo.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that are in common use. A template may know others; it then names them."""
MEANT = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any]) -> str:
    """Render messages as text with the chat template.

    If the last message is the assistant's, it is left open to be continued; otherwise the generation prompt starts a
    new message.

    Raises:
        UnusablePrompt: the template rejects the messages.
    """
    continues = messages[-1]["role"] == "assistant"
    own: dict[str, Any] = {
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        "tokenize": False,
    }
    try:
        with template_limits(arguments.get("chat_template", tokenizer.chat_template)):
            text = tokenizer.apply_chat_template(messages, **{**arguments, **own})
    except Exception as error:  # a template is a program, and may raise anything
        raise UnusablePrompt(f"the chat template refuses the messages ({error_text(error)})") from None
    assert isinstance(text, str)
    return text


def settled_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any]
) -> list[Message]:
    """Returns the messages as the template takes them: a content of one text part is a text where it knows no parts.

    Raises:
        UnusablePrompt: the template would leave a message out, or print it otherwise than it is.
    """
    _check_roles(messages, _template_of(tokenizer, arguments))
    if not any(isinstance(message.get("content"), list) for message in messages):
        _check_all_rendered(messages, render(tokenizer, messages, arguments))
        return messages
    try:
        text = render(tokenizer, messages, arguments)
    except UnusablePrompt:
        text = None
    if text is None or any(printed in text for printed in _as_python(messages)):
        messages = [{**message, "content": _only_text(message)} for message in messages]
        text = render(tokenizer, messages, arguments)
    _check_all_rendered(messages, text)
    return messages


def _template_of(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    try:
        return tokenizer.get_chat_template(arguments.get("chat_template"), tools=arguments.get("tools"))
    except ValueError as error:
        raise UnusablePrompt(f"there is no such chat template ({error_text(error)})") from None


def _check_roles(messages: list[Message], template: str) -> None:
    for message in messages:
        role = message["role"]
        if role in ROLES or f"'{role}'" in template or f'"{role}"' in template:
            continue
        known = role.strip().lower()
        meant = known if known in ROLES else MEANT.get(known)
        hint = f" (do you mean {meant!r}?)" if meant else ""
        raise UnusablePrompt(
            f"a message has the role {role!r}{hint}, which the chat template does not name; wanted: one of "
            f"{', '.join(ROLES)}"
        )


def _as_python(messages: list[Message]) -> Iterator[str]:
    """How Python prints lists of parts: what a template for texts makes of them."""
    return (str(message["content"]) for message in messages if isinstance(message.get("content"), list))


def _only_text(message: Message) -> Any:
    content = message.get("content")
    if not isinstance(content, list):
        return content
    if len(content) != 1:
        raise UnusablePrompt(
            f"the `content` of a message is a list of {len(content)} parts, but the chat template takes text; join them"
        )
    return content[0]["text"]


def _check_all_rendered(messages: list[Message], text: str) -> None:
    """Check that the longest word of each message is in the rendered text; templates may trim and escape contents.

    Of the assistant's messages, templates leave out thoughts on purpose.
    """
    check_characters(text)
    for message in messages:
        if message["role"] == "assistant":
            continue
        words = [word for content in _texts(message) for word in re.findall(r"\w+", content)]
        if words and max(words, key=len) not in text:
            raise UnusablePrompt(f"the chat template leaves out a message with the role {message['role']!r}")


def _texts(message: Message) -> list[str]:
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]
