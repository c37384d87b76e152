"""What judges were asked and answered, word for word, beside the probabilities that they return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from online_dpo.scoring.judges.llm.prompts import prompt_text
from online_dpo.types import Group, Question

Texts = tuple[str, str, str]
"""The prompt as text, the first and the second completion."""

_current: ContextVar[Asked | None] = ContextVar("questions", default=None)
"""Where judges that are running keep their questions. A coroutine that they submit to the event loop inherits it."""


class Asked:
    """The questions of some comparisons, by their texts: a judge may ask once about comparisons that look the same."""

    def __init__(self) -> None:
        self._questions: dict[Texts, tuple[Question, ...]] = {}

    def of(self, comparison: Group) -> tuple[Question, ...]:
        """Returns the questions about a comparison; none of a judge that does not tell."""
        return self._questions.get(texts_of(comparison), ()) if self._questions else ()

    def keep(self, texts: Texts, questions: Sequence[Question]) -> None:
        """Keeps the questions about the comparison with these texts."""
        self._questions[texts] = tuple(questions)


@contextmanager
def keeping_questions() -> Iterator[Asked]:
    """Collects what judges that are called inside tell with `keep_questions`."""
    asked = Asked()
    token = _current.set(asked)
    try:
        yield asked
    finally:
        _current.reset(token)


def keep_questions(texts: Texts, questions: Sequence[Question]) -> None:
    """Tells what a judge asked about a comparison, for the record of the run; without one nothing is kept."""
    asked = _current.get()
    if asked is not None:
        asked.keep(texts, questions)


def texts_of(comparison: Group) -> Texts:
    """The texts of a comparison, as judges see them."""
    first, second = comparison.completions
    return prompt_text(comparison.prompt), first.text, second.text
