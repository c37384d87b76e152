"""The hidden rubric of the quickstart: the gold score of a reply, and whether its answer is right."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache

from online_dpo.quickstart.facts import Fact, all_facts
from online_dpo.quickstart.language import CLOSINGS, FILLERS, GREETINGS, RUDE, fact_of, parse_request

RIGHT, EXPLAINED, POLITE = 3.0, 2.0, 1.5
NO_ANSWER, UNFINISHED, NONSENSE, REPEATED, RUDENESS, USELESS = 4.0, 2.0, 1.5, 1.5, 1.5, 1.0
UNKNOWN_WORD, LONG_WORD, WORD_LIMIT = 0.25, 0.1, 40
"""The rubric's bonuses and penalties, see :func:`rubric`. ``LONG_WORD`` is for each word beyond ``WORD_LIMIT``."""


def rubric_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The rubric as a reward function: the score of each completion, at most 8."""
    return [rubric(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def rubric(request_text: str, reply_text: str) -> float:
    """Compute the gold score of a reply, at most 8.0 and without a lower limit.

    Bonuses: the right answer 3, its explanation 2, a greeting as the first sentence 1.5, a closing phrase as the last
    sentence 1.5. Penalties: no answer 4; no full stop at the end 2; a sentence outside the grammar or about something
    else 1.5, and 0.25 for each word outside the vocabulary; a repeated sentence 1.5; a rude sentence 1.5; any other
    sentence without a bonus (filler, a second greeting, the answer once more) 1; each word beyond 40 costs 0.1. A reply
    with two different answers is not right, and the explanation of a wrong answer gives no bonus.

    Args:
        request_text: a request, or a whole prompt around it, as for :func:`parse_request`.
        reply_text: any text; white space around it does not count.

    Raises:
        ValueError: ``request_text`` is not a request of this language.
    """
    fact = fact_of(parse_request(request_text).text)
    stated, explained = _claims(fact)
    sentences = _sentences(reply_text)
    complete = _complete(sentences)
    answers = _answers(fact, complete)

    score = RIGHT if answers == {fact.answer} else 0.0 if answers else -NO_ANSWER
    score -= UNFINISHED if len(complete) < len(sentences) or not sentences else 0.0
    words = _words(reply_text)
    score -= UNKNOWN_WORD * sum(word not in _vocabulary() for word in words)
    score -= LONG_WORD * max(0, len(words) - WORD_LIMIT)

    earlier: set[str] = set()
    for index, sentence in enumerate(complete):
        if (sentence in GREETINGS and index == 0) or (sentence in CLOSINGS and index == len(sentences) - 1):
            score += -REPEATED if sentence in earlier else POLITE
        else:
            score += _points(sentence, earlier, stated, explained, is_right=answers == {fact.answer})
        earlier.add(sentence)
    return score


def _points(
    sentence: str, earlier: set[str], stated: Collection[str], explained: Collection[str], is_right: bool
) -> float:
    """The points of a sentence that is neither the greeting at the start nor the closing at the end."""
    if sentence in earlier:
        return -REPEATED
    if sentence in explained:
        if not earlier.isdisjoint(explained):
            return -USELESS
        return EXPLAINED if is_right else 0.0
    if sentence in stated:
        return 0.0 if earlier.isdisjoint(stated) else -USELESS
    if sentence in RUDE:
        return -RUDENESS
    return -USELESS if sentence in GREETINGS or sentence in CLOSINGS or sentence in FILLERS else -NONSENSE


@cache
def _claims(fact: Fact) -> tuple[dict[str, str], dict[str, str]]:
    """The sentences that state an answer to a fact, and those that explain one, each with its answer."""
    options = sorted({option for other in all_facts() if other.kind == fact.kind for option in other.options})
    stated = {fact.fill(template, option): option for template in fact.statements for option in options}
    return stated, {fact.fill(fact.explanation, option): option for option in options}


def is_right(request_text: str, reply_text: str) -> bool:
    """Whether the complete sentences of a reply give the right answer and no other.

    >>> is_right("What is 3 plus 2?", "It is 5. Have a nice"), is_right("What is 3 plus 2?", "It is 5. It is 6.")
    (True, False)

    Raises:
        ValueError: ``request_text`` is not a request of this language.
    """
    fact = fact_of(parse_request(request_text).text)
    return _answers(fact, _complete(_sentences(reply_text))) == {fact.answer}


def _complete(sentences: list[str]) -> list[str]:
    return [sentence for sentence in sentences if sentence[-1] in ".!?"]


def _answers(fact: Fact, sentences: list[str]) -> set[str]:
    """The answers that the sentences give."""
    stated, explained = _claims(fact)
    claims = {**stated, **explained}
    return {claims[sentence] for sentence in sentences if sentence in claims}


@cache
def _vocabulary() -> frozenset[str]:
    """All words that a reply of the grammar can contain."""
    claims = [
        fact.fill(template, option)
        for fact in all_facts()
        for template in (*fact.statements, fact.explanation)
        for option in fact.options
    ]
    return frozenset(_words(" ".join([*claims, *GREETINGS, *CLOSINGS, *RUDE, *FILLERS])))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,!?:]+", text)


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if sentence.strip()]
