"""Unknown keyword arguments of the two public classes: the error says what they are called here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
Hint = Callable[[str, Collection[str]], str]
"""From an unknown argument and the known ones to a sentence with a space before it, or to nothing."""


def names_unknown_arguments(hint: Hint) -> Callable[[Class], Class]:
    """Returns a class decorator: the constructor's error for an unknown keyword argument says what to do."""

    def decorate(cls: Class) -> Class:
        def new(subclass: type, *args: Any, **kwargs: Any) -> Any:
            check_keywords(subclass, kwargs, hint)
            return super(cls, subclass).__new__(subclass)

        new.__signature__ = inspect.signature(cls.__init__)  # pyright: ignore[reportFunctionMemberAccess]
        cls.__new__ = new  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate


def check_keywords(cls: type, given: Collection[str], hint: Hint) -> None:
    """Checks the keyword arguments of a constructor.

    Raises:
        TypeError: one of them is none of the constructor's.
    """
    parameters = inspect.signature(cls.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            raise TypeError(f"`{cls.__name__}` has no argument `{name}`.{hint(name, parameters)}")
