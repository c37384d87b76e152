"""Conversion of a dataset row to the content of a prompt: text, or a list of messages.

:func:`find_source` decides once for a dataset where the prompt is; :meth:`PromptSource.read` then reads every row in
the same way. The name of the column decides the conversion: ``messages`` loses its trailing assistant turns; ``chosen``
and ``rejected`` hold a whole conversation (a transcript or a list of messages) and lose their last answer; every other
column is used unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from online_dpo.data.template import fill_template, template_columns
from online_dpo.data.text import UnusablePrompt, checked_text, is_blank
from online_dpo.types import Message

CONVERSATION_COLUMNS = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PromptSource:
    """Where the prompt of a row comes from: a column, or a template over columns.

    ``transcript_as_text`` keeps an HH transcript as text instead of converting it to messages.

    >>> PromptSource(column="question").read({"question": "1 + 1?"})
    '1 + 1?'
    """

    column: str | None = None
    template: str | None = None
    transcript_as_text: bool = False

    def __str__(self) -> str:
        return f"column `{self.column}`" if self.template is None else "`prompt_template`"

    @property
    def holds_transcripts(self) -> bool:
        """Whether text from this source is read as an HH transcript."""
        return self.column in CONVERSATION_COLUMNS

    def read(self, row: Mapping[str, Any]) -> str | list[Message]:
        """Read and check the prompt of a row.

        Raises:
            UnusablePrompt: the row has no prompt that a model could answer.
        """
        if self.template is not None:
            return checked_text(fill_template(self.template, row))
        assert self.column is not None
        value = row.get(self.column)
        if isinstance(value, str):
            return self._read_transcript(value) if self.holds_transcripts else checked_text(value)
        if isinstance(value, list):
            messages = _checked_messages(value)
            if self.column == "messages" or self.holds_transcripts:
                messages = _without_answer(messages)
            return _ready_to_answer(messages)
        if value is None:
            raise UnusablePrompt("the value is missing (null)")
        raise UnusablePrompt(f"the value is of type {type(value).__name__}, not text or a list of messages")

    def _read_transcript(self, transcript: str) -> str | list[Message]:
        checked_text(transcript)
        try:
            messages = transcript_to_messages(transcript)
        except ValueError as error:
            raise UnusablePrompt(f"{error}; if the prompt is in another column, set `prompt_column`") from None
        _ready_to_answer(messages)
        return transcript_to_text(transcript) if self.transcript_as_text else messages


def find_source(columns: Collection[str], prompt_column: str | None, prompt_template: str | None) -> PromptSource:
    """Choose where a dataset's prompts are: the template, the named column, else ``prompt``, ``messages`` or
    ``chosen``.

    Raises:
        ValueError: a named column does not exist, the template is malformed, or no column has one of these names.
    """
    existing = ", ".join(columns)
    if prompt_template is not None:
        missing = [name for name in template_columns(prompt_template) if name not in columns]
        if missing:
            raise ValueError(f"`prompt_template` uses {', '.join(missing)}, but the dataset's columns are: {existing}.")
        return PromptSource(template=prompt_template)
    if prompt_column is not None:
        if prompt_column not in columns:
            raise ValueError(f"`prompt_column` is {prompt_column!r}, but the dataset's columns are: {existing}.")
        return PromptSource(column=prompt_column)
    for column in ("prompt", "messages", "chosen"):
        if column in columns:
            return PromptSource(column=column)
    raise ValueError(
        f"No column holds the prompts: the columns are {existing}; none of them is `prompt`, `messages` or `chosen`. "
        "Set `prompt_column` to the column of the prompts, or `prompt_template` to a text over columns."
    )


def transcript_to_messages(transcript: str) -> list[Message]:
    r"""Convert the prompt in an HH-RLHF transcript to messages: everything before the assistant's last answer.

    A turn begins with ``"\n\nHuman:"`` or ``"\n\nAssistant:"`` (``Human:`` inside a line does not count) and becomes a
    ``user`` or ``assistant`` message without white space at its ends. Consecutive turns of one speaker are joined by an
    empty line, so that roles alternate. A transcript that ends with a human turn keeps that turn. The format is that of
    the dataset ``Anthropic/hh-rlhf`` (arXiv 2204.05862).

    >>> transcript_to_messages("\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Bye.")[-1]
    {'role': 'user', 'content': 'Bye'}

    Raises:
        ValueError: the text does not begin with a turn.
    """
    return [{"role": role, "content": content} for role, content, _ in _prompt_turns(_normalised(transcript))]


def transcript_to_text(transcript: str) -> str:
    r"""Convert the prompt in an HH-RLHF transcript to text in the same format, which ends with ``"\n\nAssistant:"``.

    >>> transcript_to_text("\n\nHuman: Hi\n\nAssistant: Hello!")
    '\n\nHuman: Hi\n\nAssistant:'

    Raises:
        ValueError: the text does not begin with a turn.
    """
    text = _normalised(transcript)
    turns = _prompt_turns(text)
    return text[: turns[-1][2]].rstrip() + "\n\nAssistant:" if turns else ""


def without_nulls(value: Any) -> Any:
    """Copy a value without dict keys whose value is ``None``, at every depth.

    Datasets give all dicts of a column the same keys and fill missing ones with ``None``, but chat templates treat a
    key that exists as given.

    >>> without_nulls([{"role": "user", "content": "Hi", "tool_calls": None}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _normalised(transcript: str) -> str:
    return "\n\n" + transcript.lstrip()


def _prompt_turns(text: str) -> list[tuple[str, str, int]]:
    """(role, content, end in the text) of every turn except a last assistant turn; consecutive turns of one role are
    joined."""
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise ValueError(r"the text is no transcript: it does not begin with '\n\nHuman:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns: list[tuple[str, str, int]] = []
    for mark, end in zip(marks, ends, strict=True):
        role, content = _ROLES[mark.group(1)], text[mark.end() : end].strip()
        if turns and turns[-1][0] == role:
            content = f"{turns.pop()[1]}\n\n{content}".strip()
        turns.append((role, content, end))
    return turns[:-1] if turns[-1][0] == "assistant" else turns


def _checked_messages(values: list[Any]) -> list[Message]:
    if not values:
        raise UnusablePrompt("the list of messages is empty")
    for value in values:
        if not isinstance(value, Mapping):
            raise UnusablePrompt(f"a message is of type {type(value).__name__}, not a dict with `role` and `content`")
        if not isinstance(value.get("role"), str):
            raise UnusablePrompt("a message has no `role`")
        content = value.get("content")
        if content is None and not value.get("tool_calls"):
            raise UnusablePrompt("a message has no `content`")
        for part in content if isinstance(content, list) else ():
            _check_part(part)
        if content is not None and not isinstance(content, (str, list)):
            raise UnusablePrompt(f"the `content` of a message is of type {type(content).__name__}, not text")
    return without_nulls(values)


def _check_part(part: Any) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise UnusablePrompt("a part of a message is no dict with a `type`")
    if part["type"] != "text":
        raise UnusablePrompt(f"a part of a message is of the type {part['type']!r}; only text reaches the policy")
    if not isinstance(part.get("text"), str):
        raise UnusablePrompt("a part of a message has no `text`")


def _without_answer(messages: list[Message]) -> list[Message]:
    """The messages without the assistant's turns at the end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _ready_to_answer(messages: list[Message]) -> list[Message]:
    """The messages, after a check that the last one has content."""
    if not messages:
        raise UnusablePrompt("no message is left before the assistant's answer")
    content = messages[-1].get("content", "")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    if all(map(is_blank, texts)):
        raise UnusablePrompt("the last message is empty")
    return messages
