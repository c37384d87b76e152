"""Pieces of text of tokens: joined they are the text, for the decoders of well-known model families."""

from __future__ import annotations

import pytest

from online_dpo.rollout.completion_text import completion_texts
from online_dpo.rollout.token_texts import TokenTexts
from online_dpo.types import Prompt
from support import tiny
from support.tokenizer_kinds import KINDS, TEXT, tokenizer

ANSWERS = (TEXT, "naïve café 日本語", "🙂🙃 a question 🙂", "the end", "don't eat t11, unable")

UNKNOWN = ("suffix", ANSWERS[2])
"""Its symbols are unknown, which is a special token: the text is without them."""


@pytest.mark.parametrize(
    ("kind", "answer"), [(kind, answer) for kind in KINDS for answer in ANSWERS if (kind, answer) != UNKNOWN]
)
def test_pieces_joined_are_the_text(kind: str, answer: str) -> None:
    made = tokenizer(kind)
    prompt = made.encode("a question", add_special_tokens=False)
    ids = made.encode(answer, add_special_tokens=False)
    [text] = completion_texts(made, [Prompt("a question", tuple(prompt), 0)], [ids])
    pieces = TokenTexts(made).pieces(ids)

    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_stands_at_the_last_of_them() -> None:
    made = tokenizer("gpt2")
    ids = made.encode("é語b", add_special_tokens=False)
    pieces = TokenTexts(made).pieces(ids)

    assert [piece for piece in pieces if piece] == ["é", "語", "b"]
    assert len(pieces) > 3


def test_bytes_that_are_no_character_stay_where_they_are() -> None:
    made = tokenizer("gpt2")
    ids = made.encode("語", add_special_tokens=False)
    letter = made.encode("b", add_special_tokens=False)
    pieces = TokenTexts(made).pieces([*ids[:-1], *letter, *letter])

    assert pieces[-2:] == ["b", "b"]
    assert all("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-2])


def test_special_tokens_are_shown() -> None:
    made = tokenizer("gpt2")
    ids = [*made.encode("the end", add_special_tokens=False), made.eos_token_id]

    assert TokenTexts(made).pieces(ids)[-1] == "</s>"
    assert "".join(TokenTexts(made).pieces(ids)) == "the end</s>"


def test_the_tests_own_tokenizer() -> None:
    made = tiny.tokenizer()
    ids = [5, 6, 7, tiny.EOS]
    text = "".join(TokenTexts(made).pieces(ids)[:-1])

    assert text.split() == made.decode(ids[:-1]).split()
