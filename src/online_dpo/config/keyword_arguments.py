"""Unknown keyword arguments of the two public classes: the error says what they are called here."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, Self


class NamedArguments:
    """Base of a class whose constructor names all its arguments."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the names of keyword arguments.

        Raises:
            TypeError: a keyword argument is none of the constructor's.
        """
        parameters = inspect.signature(cls.__init__).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            for name in kwargs:
                if name not in parameters:
                    hint = cls._hint_for_argument(name, parameters)
                    raise TypeError(f"`{cls.__name__}` has no argument `{name}`.{hint}")
        return super().__new__(cls)

    @classmethod
    def _hint_for_argument(cls, name: str, known: Collection[str]) -> str:
        """A sentence on what to write in place of ``name``, with a blank before it; "" if there is nothing to say."""
        raise NotImplementedError
