"""The text of each token of a completion: pieces that joined are the text, with special tokens as they are written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that may write one character together: it has four bytes at most, and marks may follow it."""
CACHED_RUNS = 4096
SAMPLE = "unbelievably abcdefs the end"


class TokenTexts:
    """Cuts completions into the pieces of text that their tokens write.

    A token alone is decoded behind another one, since decoders treat the beginning of a text in a special way; each id
    once. Tokens that write one character together are decoded together: the last of them has the character, and the
    others have no text. Where what a token writes depends on those beside it, as in GPT-1 (a word ends in a mark that
    becomes a space before the next one), a piece is what the text gains by it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._parts: set[int] = set()  # that write no whole character alone
        self._run = lru_cache(CACHED_RUNS)(self._behind_anchor)
        self._anchor = tuple(tokenizer.encode("a", add_special_tokens=False)[-1:])
        self._anchor_text = self._decode(self._anchor)
        sample = tokenizer.encode(SAMPLE, add_special_tokens=False)
        self._stands_alone = "".join(self._of_each(sample)) == self._behind_anchor(tuple(sample))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns a piece of text for each token."""
        return self._of_each(ids) if self._stands_alone else self._gains(ids)

    def _of_each(self, ids: Sequence[int]) -> list[str]:
        known = self._pieces
        for token in {*ids}.difference(known):
            known[token] = self._behind_anchor((token,))
            if _REPLACEMENT in known[token]:
                self._parts.add(token)
        pieces = list(map(known.__getitem__, ids))
        if self._parts.isdisjoint(ids):
            return pieces
        for place in [place for place, piece in enumerate(pieces) if _REPLACEMENT in piece]:
            if _REPLACEMENT in pieces[place]:  # it may have become part of a character meanwhile
                self._join(ids, pieces, place)
        return pieces

    def _gains(self, ids: Sequence[int]) -> list[str]:
        pieces, before = [], ""
        for end in range(1, len(ids) + 1):
            text = self._behind_anchor(tuple(ids[:end]))
            whole = text if end == len(ids) else text.rstrip(_REPLACEMENT)
            pieces.append(whole[len(os.path.commonprefix([before, whole])) :])
            before = whole
        return pieces

    def _join(self, ids: Sequence[int], pieces: list[str], start: int) -> None:
        """Puts the character that begins at a place where it ends, if it is a whole one."""
        for end in range(start + 2, min(start + LONGEST_CHARACTER, len(ids)) + 1):
            text = self._run(tuple(ids[start:end]))
            if _REPLACEMENT not in text:
                pieces[start:end] = [*[""] * (end - start - 1), text]
                return

    def _behind_anchor(self, ids: tuple[int, ...]) -> str:
        """The text of tokens behind a letter, without the letter."""
        text = self._decode((*self._anchor, *ids))
        return text.removeprefix(self._anchor_text) if text.startswith(self._anchor_text) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
