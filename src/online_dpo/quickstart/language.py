"""The toy language of the quickstart: requests, and replies of mixed quality.

A grammar generates all texts, so the right answer and the gold score of each reply are known:

>>> request = sample_requests(1, seed=0)[0]
>>> request
Request(text='Good day. What is the day after Wednesday? I am in a hurry.', answer='Thursday', kind='day')
>>> sample_reply(request, random.Random(0))
'The answer is Wednesday. When Wednesday ends, you wake up and it is Wednesday. Everyone knows that.'

A checksum of its text assigns each request to one of five splits, so two splits never share a request. They do share
facts ("3 plus 2 is 5"): a held-out request asks for a known fact in a new combination of words. Settings are chosen on
the split "validation"; reported figures are from "test".
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from online_dpo.quickstart.facts import KINDS, Fact, all_facts

SPLITS = {"sft": 36, "reward": 36, "online": 16, "validation": 6, "test": 6}
"""Splits and the percentage of all requests in each."""

OPENERS = (
    "",
    "Hi. ",
    "Please help me. ",
    "Quick! ",
    "I have a question. ",
    "Hey you! ",
    "Good day. ",
    "Sorry to ask. ",
    "One question. ",
    "Tell me please. ",
)
CLOSERS = (
    "",
    " Thank you.",
    " Thanks!",
    " I am in a hurry.",
    " My teacher asked me.",
    " Answer now!",
    " Just curious.",
    " I forgot.",
)

GREETINGS = ("Hello!", "Good question!", "Happy to help!")
CLOSINGS = ("Have a nice day!", "I hope this helps!")
RUDE = ("Do not ask me again.", "Everyone knows that.")
FILLERS = (
    "There is so much more to say.",
    "I could talk about it all day.",
    "Let me think about that again.",
    "Well, things are what they are.",
)


@dataclass(frozen=True)
class Request:
    """A user's request, its right answer, and the kind of task: ``Request("What is 3 plus 2?", "5", "sum")``."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Quality:
    """The probability of each trait of a sampled reply; see :func:`sample_reply`.

    ``sure`` is the probability of the answer that the writer believes to be right: the right one if the writer is an
    ``expert``, else the fact's ``belief``. Other replies give a neighbour of a right belief, or the right answer where
    the belief is wrong: a policy cannot learn an answer that it never samples.
    """

    sure: float
    greeting: float
    closing: float
    rude: float
    explanation: float
    filler: float
    cut: float
    expert: bool = False


QUALITIES = {
    "mixed": Quality(sure=0.72, greeting=0.4, closing=0.35, rude=0.15, explanation=0.4, filler=0.45, cut=0.06),
    "plain": Quality(sure=1.0, greeting=0.0, closing=0.0, rude=0.0, explanation=0.8, filler=0.0, cut=0.0),
    "good": Quality(0.95, greeting=0.9, closing=0.9, rude=0.0, explanation=0.9, filler=0.05, cut=0.0, expert=True),
    "poor": Quality(0.15, greeting=0.1, closing=0.05, rude=0.4, explanation=0.1, filler=0.8, cut=0.2, expert=True),
}
"""Qualities by name. :func:`sample_reply` also accepts ``"broken"``: a reply with a fault."""

CONTRAST_OF_CORRECTNESS = 0.7
"""Share of mixed :func:`contrast_replies` that differ in correctness."""


@cache
def _universe() -> dict[str, Fact]:
    """All requests of the language, each with the fact that it asks for."""
    return {
        opener + fact.fill(question) + closer: fact
        for fact in all_facts()
        for opener, question, closer in product(OPENERS, KINDS[fact.kind].questions, CLOSERS)
    }


# --- requests --------------------------------------------------------------------------------------------------------


def split_of(text: str) -> str:
    """The split (a key of ``SPLITS``) of a request, which depends only on its text."""
    bucket = zlib.crc32(text.encode()) % 100
    for name, share in SPLITS.items():
        if bucket < share:
            return name
        bucket -= share
    raise AssertionError("the shares of SPLITS have to sum to 100")


def sample_requests(n: int, seed: int, split: str | None = None) -> list[Request]:
    """Sample ``n`` distinct requests of one split (a key of ``SPLITS``), or of the whole language.

    The same seed gives the same requests.

    Raises:
        ValueError: the split does not exist or has fewer than ``n`` requests.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)} or None; it is {split!r}.")
    texts = [text for text in _universe() if split is None or split_of(text) == split]
    if n > len(texts):
        raise ValueError(f"Asked for {n} requests of split {split!r}, which has {len(texts)}. Ask for fewer.")
    return [parse_request(text) for text in random.Random(seed).sample(texts, n)]


def prompt_of(request: Request) -> str:
    """The prompt of a request: ``"User: What is 3 plus 2?\\nAssistant:"``. A reply follows after one space."""
    return f"User: {request.text}\nAssistant:"


def parse_request(text: str) -> Request:
    """Find the request in a text, which may be the request alone or a whole prompt of :func:`prompt_of`.

    Raises:
        ValueError: the text is not a request of this language.
    """
    request_text = text.strip().removeprefix("User:").removesuffix("Assistant:").strip()
    fact = fact_of(request_text)
    return Request(text=request_text, answer=fact.answer, kind=fact.kind)


def fact_of(request_text: str) -> Fact:
    """The fact that a request asks for.

    Raises:
        ValueError: the text is not a request of this language.
    """
    if request_text not in _universe():
        raise ValueError(f"Not a request of the quickstart: {request_text!r}. Take requests from `sample_requests`.")
    return _universe()[request_text]


# --- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The content of a reply before it is written. ``explained`` is the answer in the explanation, if there is one;
    ``kept`` is the share of words that is kept."""

    greeting: str
    statement: str
    answer: str
    explained: str | None
    fillers: tuple[str, ...]
    ending: str
    kept: float

    def sentences(self, fact: Fact) -> list[str]:
        """The sentences of the reply, in order."""
        explanation = [] if self.explained is None else [fact.fill(fact.explanation, self.explained)]
        statement = fact.fill(self.statement, self.answer)
        return [part for part in (self.greeting, statement, *explanation, *self.fillers, self.ending) if part]


def _draw_plan(fact: Fact, rng: random.Random, quality: Quality) -> _Plan:
    believed = fact.answer if quality.expert else fact.belief
    others = fact.neighbours if believed == fact.answer else (fact.answer,)
    answer = believed if rng.random() < quality.sure else rng.choice(others)
    explains = rng.random() < quality.explanation
    # At most two sentences besides the answer, greeting and ending, so that replies fit in 48 tokens.
    filler_count = rng.randint(1, 1 if explains else 2) if rng.random() < quality.filler else 0
    ending = rng.random()
    return _Plan(
        greeting=rng.choice(GREETINGS) if rng.random() < quality.greeting else "",
        statement=rng.choice(fact.statements),
        answer=answer,
        explained=answer if explains else None,
        fillers=tuple(rng.sample(FILLERS, filler_count)),
        ending=(
            rng.choice(CLOSINGS)
            if ending < quality.closing
            else rng.choice(RUDE)
            if ending < quality.closing + quality.rude
            else ""
        ),
        kept=rng.uniform(0.3, 0.9) if rng.random() < quality.cut else 1.0,
    )


def _render(plan: _Plan, fact: Fact) -> str:
    return _truncate(" ".join(plan.sentences(fact)), plan.kept)


def _truncate(text: str, share: float) -> str:
    """The first words of a text: the given share, at least one."""
    words = text.split(" ")
    return " ".join(words[: max(1, round(share * len(words)))])


def sample_reply(request: Request, rng: random.Random, quality: str = "mixed") -> str:
    """Sample a reply to a request, without the space that separates it from the prompt.

    ``quality``: a key of ``QUALITIES``, or ``"broken"`` for faults that a policy can learn when it is trained against a
    reward model: repeated sentences, shuffled words, no answer, two answers, flattery, a sentence about something else.

    Raises:
        ValueError: ``quality`` is unknown, or the request is not of this language.
    """
    fact = fact_of(request.text)
    if quality == "broken":
        return _break(_draw_plan(fact, rng, QUALITIES["good" if rng.random() < 0.5 else "mixed"]), fact, rng)
    if quality not in QUALITIES:
        raise ValueError(f"`quality` must be broken or one of {', '.join(QUALITIES)}; it is {quality!r}.")
    return _render(_draw_plan(fact, rng, QUALITIES[quality]), fact)


def contrast_replies(request: Request, rng: random.Random, quality: str = "mixed") -> tuple[str, str]:
    """Sample two replies that differ in one trait.

    The trait is most often correctness (see :func:`right_and_wrong`), else greeting, explanation, fillers or ending, in
    which the two may happen to be equal. ``"plain"`` replies differ only in correctness. ``quality`` is a key of
    ``QUALITIES``.

    Raises:
        ValueError: the request is not of this language.
    """
    if quality == "plain" or rng.random() < CONTRAST_OF_CORRECTNESS:
        return right_and_wrong(request, rng, quality)
    fact = fact_of(request.text)
    first, second = (replace(_draw_plan(fact, rng, QUALITIES[quality]), kept=1.0) for _ in range(2))
    trait = rng.choice(("greeting", "explained", "fillers", "ending"))
    if trait == "explained":
        second = replace(second, explained=None if first.explained else first.answer)
    return _render(first, fact), _render(replace(first, **{trait: getattr(second, trait)}), fact)


def right_and_wrong(request: Request, rng: random.Random, quality: str = "mixed") -> tuple[str, str]:
    """Sample two replies that differ only in correctness, the right one first.

    Either the statement or the explanation is wrong, equally often; sometimes both are, or there is no explanation.

    Raises:
        ValueError: the request is not of this language.
    """
    fact = fact_of(request.text)
    wrong = rng.choice(fact.neighbours)
    wrong_part = rng.choices(("statement", "explanation", "both", "no explanation"), weights=(4, 4, 1, 2))[0]
    right = replace(
        _draw_plan(fact, rng, QUALITIES[quality]),
        answer=fact.answer,
        explained=None if wrong_part == "no explanation" else fact.answer,
        kept=1.0,
    )
    changed = replace(
        right,
        answer=fact.answer if wrong_part == "explanation" else wrong,
        explained=wrong if wrong_part in ("explanation", "both") else right.explained,
    )
    return _render(right, fact), _render(changed, fact)


def _break(plan: _Plan, fact: Fact, rng: random.Random) -> str:
    """Write a reply with one fault."""
    sentences = plan.sentences(fact)
    index = rng.randrange(len(sentences))
    other = rng.choice(all_facts())
    unrelated = other.fill(rng.choice((*other.statements, other.explanation)), rng.choice(other.options))
    fault = rng.choice(("repeat", "shuffle", "evade", "contradict", "flatter", "stray", "splice"))
    if fault == "repeat":
        sentences[index:index] = [sentences[index]] * rng.randint(1, 3)
    elif fault == "shuffle":
        words = " ".join(sentences).split(" ")
        rng.shuffle(words)
        return " ".join(words)
    elif fault == "evade":
        sentences = [plan.greeting or rng.choice(GREETINGS), *plan.fillers, plan.ending or rng.choice(CLOSINGS)]
    elif fault == "contradict":
        sentences.insert(index, fact.fill(rng.choice((*fact.statements, fact.explanation)), rng.choice(fact.options)))
    elif fault == "flatter":
        extra = rng.sample(GREETINGS + CLOSINGS, rng.randint(1, 3))
        sentences = [*extra, *sentences] if rng.random() < 0.5 else [*sentences, *extra]
    elif fault == "stray":
        sentences[index] = unrelated
    else:
        head, tail = sentences[index].split(" "), unrelated.split(" ")
        sentences[index] = " ".join(head[: rng.randint(1, len(head))] + tail[rng.randrange(len(tail)) :])
    return " ".join(sentences)
