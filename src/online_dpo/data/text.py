"""Checks of the text of a prompt."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 1_000_000
"""Characters of a prompt. A tokenizer needs hundreds of bytes for each; no context has room for as many."""

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Mc", "Me", "Mn", "Zl", "Zp", "Zs"})
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are drawn as nothing."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_MESSAGES_AS_TEXT = re.compile(r"""\s*(\[\s*\{\s*["'](role|content|from)|\{\s*["']role)["']\s*:""")


class UnusablePrompt(Exception):
    """A row is not a usable prompt; the message is the reason. The row function turns it into an error or a count."""


def checked_text(text: str) -> str:
    """Returns the text of a prompt, if it is one.

    Raises:
        UnusablePrompt: the text has no visible character, is too long, holds half of a character, or is a list of
            messages that has been written as text.
    """
    if not text.strip():
        raise UnusablePrompt("the text is empty")
    if is_blank(text):
        raise UnusablePrompt("the text has no visible character")
    check_characters(text)
    if _MESSAGES_AS_TEXT.match(text):
        raise UnusablePrompt(
            "the text is a list of messages that has been written as text; give the list itself (in a jsonl file)"
        )
    return text


def check_characters(text: str) -> None:
    """Check that a tokenizer can read the text.

    Raises:
        UnusablePrompt: it is too long, or holds half of a character.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnusablePrompt(f"the text has {len(text)} characters; wanted: at most {MAX_CHARACTERS}")
    if half := _SURROGATE.search(text):
        raise UnusablePrompt(f"the text holds half of a character (U+{ord(half[0]):04X}, a lone surrogate)")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control, zero-width and combining characters, and fillers alone.

    >>> is_blank(" \\u200b\\ufeff"), is_blank("\\u200ba")
    (True, False)
    """
    return all(unicodedata.category(letter) in _INVISIBLE or letter in _FILLERS for letter in text)
