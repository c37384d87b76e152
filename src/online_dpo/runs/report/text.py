"""Text of models and data on a page: what cannot be seen is made visible, and differing words are marked."""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from online_dpo.errors import one_line

LONGEST = 1500
"""Characters of a text that are shown."""
WORDS_COMPARED = 400

LONGEST_NAME = 200
"""Characters of a name that are shown."""

_MARKS = re.compile(r"[\\`*\[\]|~$!#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
"""Control characters but tab and new line, what turns the direction of text round, and halves of surrogate pairs."""


def seen(text: str, longest: int = LONGEST) -> str:
    """A text in which every character can be seen, cut where it is too long.

    >>> seen("a\\x00b\\u202ec", longest=20)
    'a⟨U+0000⟩b⟨U+202E⟩c'
    """
    cut = text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", cut)


def differing(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts with those words marked that are not in the other one.

    >>> differing("a red car", "a blue car")[1]
    Markup('a <mark>blue</mark> car')
    """
    old, new = _pieces(before), _pieces(after)
    if max(len(old), len(new)) > 2 * WORDS_COMPARED:
        return escape("".join(old)), escape("".join(new))
    marked: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, *(a, b, c, d) in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for out, piece in zip(marked, ("".join(old[a:b]), "".join(new[c:d])), strict=True):
            out.append(escape(piece) if kind == "equal" or not piece.strip() else _mark(piece))
    return Markup("").join(marked[0]), Markup("").join(marked[1])


def plain_text(text: str) -> str:
    """A text of others in Markdown that shows as it is, in one line: no mark-up, no HTML, no further cell of a table.

    >>> print(plain_text("a|b [x](y) <b>"))
    a\\|b \\[x\\](y) &lt;b&gt;
    """
    return _MARKS.sub(r"\\\g<0>", html.escape(one_line(text, LONGEST_NAME), quote=False))


def _pieces(text: str) -> list[str]:
    """Words and what is between them."""
    return re.findall(r"\s+|[^\s]+", text)


def _mark(piece: str) -> Markup:
    """The piece as marked, without the white space around it."""
    inner = piece.strip()
    start = piece.index(inner)
    return escape(piece[:start]) + Markup("<mark>{}</mark>").format(inner) + escape(piece[start + len(inner) :])
