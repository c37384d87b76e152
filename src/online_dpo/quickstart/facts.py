"""The facts of the toy language, and the kinds of requests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product

STATEMENTS = ("It is {answer}.", "The answer is {answer}.")
"""Templates that state an answer to any kind of request; each kind has one more."""


@dataclass(frozen=True)
class Fact:
    """One fact that can be asked for.

    ``options`` are all answers that a reply may give; ``neighbours`` are the wrong ones next to the right one.
    ``belief`` is the answer that a mediocre writer believes to be right: the right answer, or for some facts one of the
    neighbours.
    """

    kind: str
    slots: tuple[tuple[str, str], ...]
    answer: str
    options: tuple[str, ...]
    neighbours: tuple[str, ...]
    belief: str

    def fill(self, template: str, answer: str = "") -> str:
        """Fill a template with the fact's words and an answer."""
        return template.format(answer=answer, **dict(self.slots))

    @property
    def statements(self) -> tuple[str, ...]:
        """Templates that state an answer."""
        return (*STATEMENTS, KINDS[self.kind].statement)

    @property
    def explanation(self) -> str:
        """The template that explains an answer."""
        return KINDS[self.kind].explanation


@dataclass(frozen=True)
class Kind:
    """Templates to ask, answer and explain one kind of request, with placeholders ``{a}``, ``{b}`` and ``{answer}``."""

    questions: tuple[str, str, str]
    statement: str
    explanation: str


KINDS = {
    "sum": Kind(
        ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
        "{a} plus {b} is {answer}.",
        "Start at {a} and count up {b} steps to reach {answer}.",
    ),
    "difference": Kind(
        ("What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} from {a}."),
        "{a} minus {b} is {answer}.",
        "Start at {a} and count down {b} steps to reach {answer}.",
    ),
    "opposite": Kind(
        ("What is the opposite of {a}?", "Which word is the opposite of {a}?", "Give me the opposite of {a}."),
        "The opposite of {a} is {answer}.",
        "If one thing is {a}, a very different thing is {answer}.",
    ),
    "plural": Kind(
        ("What is the plural of {a}?", "Which word is the plural of {a}?", "Give me the plural of {a}."),
        "The plural of {a} is {answer}.",
        "You say one {a} but many {answer}.",
    ),
    "colour": Kind(
        ("What is the colour of {a}?", "Which colour do you see in {a}?", "Give me the colour of {a}."),
        "The colour of {a} is {answer}.",
        "When you look at {a}, you see {answer}.",
    ),
    "compare": Kind(
        ("Which is bigger, the {a} or the {b}?", "Is the {a} or the {b} bigger?", "Name the bigger one: {a} or {b}."),
        "The bigger one is {answer}.",
        "If you put both side by side, you need more room for {answer}.",
    ),
    "day": Kind(
        ("Which day comes after {a}?", "What is the day after {a}?", "Name the day after {a}."),
        "The day after {a} is {answer}.",
        "When {a} ends, you wake up and it is {answer}.",
    ),
}

_OPPOSITES = "hot cold, big small, fast slow, happy sad, old new, loud quiet"
_PLURALS = "cat cats, mouse mice, child children, foot feet, tooth teeth, box boxes, leaf leaves, city cities"
_COLOURS = "grass green, snow white, coal black, blood red, butter yellow, chocolate brown, rust orange, water blue"
_BY_SIZE = ("ant", "mouse", "horse", "mountain")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NUMBERS = tuple(str(n) for n in range(10))

MISTAKEN_EVERY = 7
"""One fact in this many has a wrong belief."""


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (entry.split() for entry in table.split(", "))]


@cache
def all_facts() -> tuple[Fact, ...]:
    """All facts of the language, in a fixed order."""
    return tuple(
        replace(fact, belief=fact.neighbours[0]) if number % MISTAKEN_EVERY == MISTAKEN_EVERY // 2 else fact
        for number, fact in enumerate(_list_facts())
    )


def _list_facts() -> Iterator[Fact]:
    """All facts, each with its right answer as belief."""
    for a, b in product(range(1, 4), repeat=2):
        yield _fact("sum", (a, b), str(a + b), _NUMBERS)
    for a, b in combinations(range(4, 0, -1), 2):
        yield _fact("difference", (a, b), str(a - b), _NUMBERS)
    opposites = [pair for left, right in _pairs(_OPPOSITES) for pair in ((left, right), (right, left))]
    for kind, table in (("opposite", opposites), ("plural", _pairs(_PLURALS)), ("colour", _pairs(_COLOURS))):
        options = tuple(answer for _, answer in table)
        for word, answer in table:
            yield _fact(kind, (word,), answer, options)
    things = tuple(f"the {thing}" for thing in _BY_SIZE)
    for small, big in combinations(range(len(_BY_SIZE)), 2):
        # A reply may name any thing: if only the two in question occurred, "the mountain" would always be right.
        neighbours = (things[small], *(thing for thing in things if thing not in (things[small], things[big])))
        for a, b in ((small, big), (big, small)):
            slots = (("a", _BY_SIZE[a]), ("b", _BY_SIZE[b]))
            yield Fact("compare", slots, things[big], things, neighbours, things[big])
    for day, following in zip(_DAYS, _DAYS[1:] + _DAYS[:1], strict=True):
        yield _fact("day", (day,), following, _DAYS)


def _fact(kind: str, words: tuple[object, ...], answer: str, options: tuple[str, ...]) -> Fact:
    """A fact whose neighbours are those of the answer in ``options``, which form a circle."""
    place = options.index(answer)
    neighbours = (options[(place + 1) % len(options)], options[place - 1])
    return Fact(kind, tuple(zip("ab", map(str, words), strict=False)), answer, options, neighbours, answer)
