"""The toy language of the quickstart: requests, replies of mixed quality, and the hidden rubric that judges any reply.

A grammar generates everything, so the right answer and the gold score of a reply are known:

>>> request = sample_requests(1, seed=0)[0]
>>> request
Request(text='Hi. What is 3 plus 5? Thanks!', answer='8', kind='sum')
>>> sample_reply(request, random.Random(0))
'Hello! It is 8. I could talk about it all day.'
>>> rubric(request.text, "Hello! It is 8. Start at 3 and count up 5 steps to reach 8. I hope this helps!")
8.0

Requests belong to one of four splits by a checksum of their text, so no two splits can share a request. The facts behind
them ("3 plus 5 is 8") are shared: a held-out request asks a known thing in words that were never seen together.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

SPLITS = {"sft": 40, "reward": 30, "online": 20, "eval": 10}
"""Splits and the percentage of all requests in each."""

OPENERS = ("", "Hi. ", "Please help me. ", "Quick! ", "I have a question. ", "Hey you! ", "Good day. ", "Sorry to ask. ")
CLOSERS = ("", " Thank you.", " Thanks!", " I am in a hurry.", " My teacher asked me.", " Answer now!", " Just curious.")

GREETINGS = ("Hello!", "Good question!", "Happy to help!")
CLOSINGS = ("Have a nice day!", "I hope this helps!")
RUDE = ("Do not ask me again.", "Everyone knows that.")
FILLERS = (
    "There is so much more to say.",
    "I could talk about it all day.",
    "Let me think about that again.",
    "Well, things are what they are.",
)
STATEMENTS = ("It is {answer}.", "The answer is {answer}.")
"""Ways to state an answer that fit every kind of request; each kind has a third of its own."""

RIGHT, EXPLAINED, POLITE = 3.0, 2.0, 1.5
NO_ANSWER, UNFINISHED, NONSENSE, REPEATED, RUDENESS, USELESS = 4.0, 2.0, 1.5, 1.5, 1.5, 1.0
UNKNOWN_WORD, LONG_WORD, WORD_LIMIT = 0.25, 0.1, 40
"""The rubric's gains and costs, see :func:`rubric`. ``LONG_WORD`` is the cost of each word beyond ``WORD_LIMIT``."""


@dataclass(frozen=True)
class Request:
    """What a user asks, the right answer, and the kind of task: ``Request("What is 3 plus 5?", "8", "sum")``."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Quality:
    """How probable each trait of a sampled reply is; see :func:`sample_reply`."""

    right: float
    greeting: float
    closing: float
    rude: float
    explanation: float
    filler: float
    cut: float


QUALITIES = {
    "mixed": Quality(right=0.55, greeting=0.4, closing=0.35, rude=0.15, explanation=0.3, filler=0.45, cut=0.06),
    "plain": Quality(right=1.0, greeting=0.0, closing=0.0, rude=0.0, explanation=0.3, filler=0.0, cut=0.0),
    "good": Quality(right=0.95, greeting=0.9, closing=0.9, rude=0.0, explanation=0.9, filler=0.05, cut=0.0),
    "poor": Quality(right=0.15, greeting=0.1, closing=0.05, rude=0.4, explanation=0.1, filler=0.8, cut=0.2),
}
"""Named qualities. ``"broken"`` is one more name that :func:`sample_reply` takes: a mixed reply, damaged."""


@dataclass(frozen=True)
class _Fact:
    """One thing that can be asked; ``options`` are the answers a reply may give, right and wrong."""

    kind: str
    slots: tuple[tuple[str, str], ...]
    answer: str
    options: tuple[str, ...]

    def fill(self, template: str, answer: str = "") -> str:
        return template.format(answer=answer, **dict(self.slots))


@dataclass(frozen=True)
class _Kind:
    questions: tuple[str, str, str]
    statement: str
    explanation: str


_KINDS = {
    "sum": _Kind(
        ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
        "{a} plus {b} is {answer}.",
        "Start at {a} and count up {b} steps to reach {answer}.",
    ),
    "difference": _Kind(
        ("What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} from {a}."),
        "{a} minus {b} is {answer}.",
        "Start at {a} and count down {b} steps to reach {answer}.",
    ),
    "opposite": _Kind(
        ("What is the opposite of {a}?", "Which word is the opposite of {a}?", "Give me the opposite of {a}."),
        "The opposite of {a} is {answer}.",
        "If one thing is {a}, a very different thing is {answer}.",
    ),
    "plural": _Kind(
        ("What is the plural of {a}?", "Which word is the plural of {a}?", "Give me the plural of {a}."),
        "The plural of {a} is {answer}.",
        "You say one {a} but many {answer}.",
    ),
    "colour": _Kind(
        ("What is the colour of {a}?", "Which colour do you see in {a}?", "Give me the colour of {a}."),
        "The colour of {a} is {answer}.",
        "When you look at {a}, you see {answer}.",
    ),
    "compare": _Kind(
        ("Which is bigger, the {a} or the {b}?", "Is the {a} or the {b} bigger?", "Name the bigger one: {a} or {b}."),
        "The bigger one is {answer}.",
        "If you put both side by side, you need more room for {answer}.",
    ),
    "letters": _Kind(
        ("How many letters are in {a}?", "How long is the word {a}?", "Count the letters in {a}."),
        "The word {a} has {answer} letters.",
        "Spell {a} letter by letter and you count to {answer}.",
    ),
    "day": _Kind(
        ("Which day comes after {a}?", "What is the day after {a}?", "Name the day after {a}."),
        "The day after {a} is {answer}.",
        "When {a} ends, you wake up and it is {answer}.",
    ),
}

_OPPOSITES = "hot cold, big small, fast slow, happy sad, old new, loud quiet"
_PLURALS = "cat cats, mouse mice, child children, foot feet, tooth teeth, box boxes, leaf leaves, city cities"
_COLOURS = "grass green, snow white, coal black, blood red, butter yellow, chocolate brown, rust orange, water blue"
_BY_SIZE = ("ant", "mouse", "cat", "horse", "mountain")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (entry.split() for entry in table.split(", "))]


@cache
def _facts() -> tuple[_Fact, ...]:
    return tuple(_list_facts())


def _list_facts() -> Iterator[_Fact]:
    numbers = tuple(str(n) for n in range(11))
    for a, b in product(range(1, 6), repeat=2):
        if a < 5 and b < 5:
            yield _Fact("sum", (("a", str(a)), ("b", str(b))), str(a + b), numbers[2:9])
        if b < a:
            yield _Fact("difference", (("a", str(a)), ("b", str(b))), str(a - b), numbers[1:6])
    opposites = _pairs(_OPPOSITES) + [(right, left) for left, right in _pairs(_OPPOSITES)]
    for kind, table in (("opposite", opposites), ("plural", _pairs(_PLURALS)), ("colour", _pairs(_COLOURS))):
        options = tuple(sorted({answer for _, answer in table}))
        for word, answer in table:
            yield _Fact(kind, (("a", word),), answer, options)
    for a, b in product(range(len(_BY_SIZE)), repeat=2):
        if a != b:
            slots = (("a", _BY_SIZE[a]), ("b", _BY_SIZE[b]))
            options = tuple(f"the {_BY_SIZE[i]}" for i in (a, b))
            yield _Fact("compare", slots, f"the {_BY_SIZE[max(a, b)]}", options)
    for word, _ in _pairs(_PLURALS):
        yield _Fact("letters", (("a", word),), str(len(word)), numbers[2:9])
    for day, following in zip(_DAYS, _DAYS[1:] + _DAYS[:1], strict=True):
        yield _Fact("day", (("a", day),), following, _DAYS)


@cache
def _universe() -> dict[str, _Fact]:
    """Every request of the language and the fact it asks for."""
    return {
        opener + fact.fill(question) + closer: fact
        for fact in _facts()
        for opener, question, closer in product(OPENERS, _KINDS[fact.kind].questions, CLOSERS)
    }


@cache
def _vocabulary() -> frozenset[str]:
    """Every word that a reply of the grammar can hold."""
    claims = [
        fact.fill(template, option) for fact in _facts() for template in _templates(fact) for option in fact.options
    ]
    return frozenset(_words(" ".join([*claims, *GREETINGS, *CLOSINGS, *RUDE, *FILLERS])))


def _templates(fact: _Fact) -> tuple[str, ...]:
    kind = _KINDS[fact.kind]
    return (*STATEMENTS, kind.statement, kind.explanation)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,!?:]+", text)


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if sentence.strip()]


# --- requests -----------------------------------------------------------------------------------------------------------


def split_of(text: str) -> str:
    """The split (a key of ``SPLITS``) that the request ``text`` belongs to; a pure function of the text."""
    place = zlib.crc32(text.encode()) % 100
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares of SPLITS have to sum to 100")


def sample_requests(n: int, seed: int, split: str | None = None) -> list[Request]:
    """``n`` distinct requests, the same for the same arguments; of one split (a key of ``SPLITS``), or of the whole language.

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
    """The prompt as the policy sees it; a reply follows after one space: ``"User: What is 3 plus 5?\\nAssistant:"``."""
    return f"User: {request.text}\nAssistant:"


def parse_request(text: str) -> Request:
    """The request in ``text``, which may be the request alone or a whole prompt of :func:`prompt_of`.

    Raises:
        ValueError: the text is no request of this language.
    """
    bare = text.strip().removeprefix("User:").removesuffix("Assistant:").strip()
    fact = _fact_of(bare)
    return Request(text=bare, answer=fact.answer, kind=fact.kind)


def _fact_of(request_text: str) -> _Fact:
    if request_text not in _universe():
        raise ValueError(f"Not a request of the quickstart: {request_text!r}. Take requests from `sample_requests`.")
    return _universe()[request_text]


# --- replies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a reply will say, before it is put in words."""

    greeting: str
    statement: str
    answer: str
    explanation: bool
    fillers: tuple[str, ...]
    ending: str
    kept: float

    def sentences(self, fact: _Fact) -> list[str]:
        explanation = [fact.fill(_KINDS[fact.kind].explanation, self.answer)] if self.explanation else []
        statement = fact.fill(self.statement, self.answer)
        return [part for part in (self.greeting, statement, *explanation, *self.fillers, self.ending) if part]


def _draw_plan(fact: _Fact, rng: random.Random, quality: Quality) -> _Plan:
    wrong = [option for option in fact.options if option != fact.answer]
    explanation = rng.random() < quality.explanation
    # At most two more sentences beside the answer, greeting and ending, so that replies fit in 48 tokens.
    filler_count = rng.randint(1, 1 if explanation else 2) if rng.random() < quality.filler else 0
    ending = rng.random()
    return _Plan(
        greeting=rng.choice(GREETINGS) if rng.random() < quality.greeting else "",
        statement=rng.choice(_templates(fact)[:3]),
        answer=fact.answer if rng.random() < quality.right else rng.choice(wrong),
        explanation=explanation,
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


def _render(plan: _Plan, fact: _Fact) -> str:
    return _keep(" ".join(plan.sentences(fact)), plan.kept)


def _keep(text: str, share: float) -> str:
    words = text.split(" ")
    return " ".join(words[: max(1, round(share * len(words)))])


def sample_reply(request: Request, rng: random.Random, quality: str = "mixed") -> str:
    """A reply to ``request``, without the space that parts it from the prompt.

    ``quality``: a key of ``QUALITIES``, or ``"broken"`` for the faults that a policy may fall into when it is trained
    against a reward model: repeated sentences, shuffled words, no answer, two answers, flattery, another request's answer.

    Raises:
        ValueError: ``quality`` is none of these, or the request is not of this language.
    """
    fact = _fact_of(request.text)
    if quality == "broken":
        return _break(_draw_plan(fact, rng, QUALITIES["good" if rng.random() < 0.5 else "mixed"]), fact, rng)
    if quality not in QUALITIES:
        raise ValueError(f"`quality` must be broken or one of {', '.join(QUALITIES)}; it is {quality!r}.")
    return _render(_draw_plan(fact, rng, QUALITIES[quality]), fact)


def contrast_replies(request: Request, rng: random.Random, quality: str = "mixed") -> tuple[str, str]:
    """Two replies that differ in one trait: half of the time in the answer, which the first reply has right; else in the
    greeting, explanation, fillers or ending, where chance may make them equal. ``quality`` is a key of ``QUALITIES``.

    Raises:
        ValueError: the request is not of this language.
    """
    fact = _fact_of(request.text)
    first, second = (replace(_draw_plan(fact, rng, QUALITIES[quality]), kept=1.0) for _ in range(2))
    if quality == "plain" or rng.random() < 0.5:
        wrong = rng.choice([option for option in fact.options if option != fact.answer])
        return _render(replace(first, answer=fact.answer), fact), _render(replace(first, answer=wrong), fact)
    trait = rng.choice(("greeting", "explanation", "fillers", "ending"))
    return _render(first, fact), _render(replace(first, **{trait: getattr(second, trait)}), fact)


def _break(plan: _Plan, fact: _Fact, rng: random.Random) -> str:
    sentences = plan.sentences(fact)
    place = rng.randrange(len(sentences))
    other = rng.choice(_facts())
    foreign = other.fill(rng.choice(_templates(other)), rng.choice(other.options))
    fault = rng.choice(("repeat", "shuffle", "evade", "contradict", "flatter", "stray", "splice"))
    if fault == "repeat":
        sentences[place:place] = [sentences[place]] * rng.randint(1, 3)
    elif fault == "shuffle":
        words = " ".join(sentences).split(" ")
        rng.shuffle(words)
        return " ".join(words)
    elif fault == "evade":
        sentences = [plan.greeting or rng.choice(GREETINGS), *plan.fillers, plan.ending or rng.choice(CLOSINGS)]
    elif fault == "contradict":
        sentences.insert(place, fact.fill(rng.choice(_templates(fact)), rng.choice(fact.options)))
    elif fault == "flatter":
        extra = rng.sample(GREETINGS + CLOSINGS, rng.randint(1, 3))
        sentences = [*extra, *sentences] if rng.random() < 0.5 else [*sentences, *extra]
    elif fault == "stray":
        sentences[place] = foreign
    else:
        head, tail = sentences[place].split(" "), foreign.split(" ")
        sentences[place] = " ".join(head[: rng.randint(1, len(head))] + tail[rng.randrange(len(tail)) :])
    return " ".join(sentences)


# --- the rubric ---------------------------------------------------------------------------------------------------------


def rubric(request_text: str, reply_text: str) -> float:
    """The gold score of any reply text, at most 8.0 and without a lower limit.

    Gains: the right answer 4, an explanation of it 2, a greeting as the first sentence 1, a closing phrase as the last
    one 1. Costs: no answer 3; no full stop at the end 2; a sentence outside the grammar or about something else 1, and
    0.25 for each word that the language does not have; a sentence said before 1; a rude sentence 1; any other sentence that
    gains nothing (filler, a second greeting, the answer once more) 0.75; each word beyond 40 costs 0.1. A reply that
    gives two different answers has not answered right, and only a right answer can be explained.

    Args:
        request_text: a request or a whole prompt around it, as :func:`parse_request` takes it.
        reply_text: anything; spaces around it do not count.

    Raises:
        ValueError: ``request_text`` is no request of this language.
    """
    fact = _fact_of(parse_request(request_text).text)
    stated, explained = _claims(fact)
    sentences = _sentences(reply_text)
    complete = [sentence for sentence in sentences if sentence[-1] in ".!?"]
    claims = {**stated, **explained}
    answers = {claims[sentence] for sentence in complete if sentence in claims}

    score = RIGHT if answers == {fact.answer} else 0.0 if answers else -NO_ANSWER
    score -= UNFINISHED if len(complete) < len(sentences) or not sentences else 0.0
    words = _words(reply_text)
    score -= UNKNOWN_WORD * sum(word not in _vocabulary() for word in words)
    score -= LONG_WORD * max(0, len(words) - WORD_LIMIT)

    said: set[str] = set()
    for place, sentence in enumerate(complete):
        if sentence in said:
            score -= REPEATED
        elif (sentence in GREETINGS and place == 0) or (sentence in CLOSINGS and place == len(sentences) - 1):
            score += POLITE
        elif sentence in explained:
            first = said.isdisjoint(explained)
            worth = EXPLAINED if answers == {fact.answer} else EXPLAINED / 2 if len(answers) == 1 else 0.0
            score += worth if first else -USELESS
        elif sentence in stated:
            score -= 0.0 if said.isdisjoint(stated) else USELESS
        elif sentence in RUDE:
            score -= RUDENESS
        elif sentence in GREETINGS or sentence in CLOSINGS or sentence in FILLERS:
            score -= USELESS
        else:
            score -= NONSENSE
        said.add(sentence)
    return score


@cache
def _claims(fact: _Fact) -> tuple[dict[str, str], dict[str, str]]:
    """The sentences that state an answer to ``fact``, and those that explain one, each with the answer it gives."""
    options = sorted({option for other in _facts() if other.kind == fact.kind for option in other.options})
    *statements, explanation = _templates(fact)
    stated = {fact.fill(template, option): option for template in statements for option in options}
    return stated, {fact.fill(explanation, option): option for option in options}
