"""Registries: the things of one kind (losses, engines ...) by the names that a configuration uses.

A name is added where the thing is defined, by a decorator, in this package and outside of it alike. Nothing heavy is
imported here: the configuration asks what has been registered without loading the stages.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Decorated = TypeVar("Decorated")

KINDS = {"loss_type": "loss", "pair_selection": "strategy", "method": "method", "engine": "engine"}
"""Fields of the configuration that take registered names, and the kind of what they name."""


class RegistryError(ValueError):
    """A name is taken, or nothing has that name."""


@dataclass(frozen=True)
class _Entry(Generic[T]):
    """A registered thing.

    ``place`` is the line that registered it, ``definition`` its ``module.name``, ``traits`` what the configuration has
    to know about it.
    """

    thing: T
    place: str
    definition: set[str]
    traits: frozenset[str]


class Registry(Collection[str], Generic[T]):
    """Things of one kind by name; as a collection, their names.

    >>> LOSSES: Registry[PairLoss] = Registry("loss")
    >>> LOSSES["sigmoid"]

    Args:
        kind: what a message calls them.
        modules: names that are registered by importing these modules, which happens when a name is asked for.
    """

    def __init__(self, kind: str, modules: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._imported_for = dict(modules or {})
        self._entries: dict[str, _Entry[T]] = {}
        _REGISTRIES[kind] = self

    def decorator(
        self, name: str, keep: Callable[[Any], T], traits: Collection[str] = ()
    ) -> Callable[[Decorated], Decorated]:
        """Decorates what is registered under ``name`` and leaves it as it is; ``keep(it)`` is what the registry holds.

        To be called by the function that a user calls, whose line is the place that messages name.
        """
        frame = inspect.currentframe()
        for _ in range(2):
            assert frame is not None  # CPython has frames
            frame = frame.f_back
        assert frame is not None
        file, module = frame.f_code.co_filename, frame.f_globals["__name__"]
        place = f"{file}:{frame.f_lineno}"

        def register(decorated: Decorated) -> Decorated:
            named = inspect.isclass(decorated) or inspect.isroutine(decorated)
            owners = (file, module) if named else ()  # a file may be imported under two names, a cell has new files
            definition = {f"{owner}:{decorated.__qualname__}" for owner in owners}  # pyright: ignore[reportAttributeAccessIssue]
            self._check_free(name, definition)
            self._entries[name] = _Entry(keep(decorated), place, definition, frozenset(traits))
            return decorated

        return register

    def forget(self, name: str) -> None:
        """Remove a name that was registered."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        """Returns what is registered under a name.

        Raises:
            RegistryError: nothing has that name.
        """
        if name not in self._entries and name in self._imported_for:
            importlib.import_module(self._imported_for[name])
        if name not in self._entries:
            raise RegistryError(self.unknown(name))
        return self._entries[name].thing

    def __contains__(self, name: object) -> bool:
        return name in self._imported_for or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter({**self._imported_for, **self._entries})

    def __len__(self) -> int:
        return len({**self._imported_for, **self._entries})

    def having(self, trait: str) -> list[str]:
        """The registered names with this trait."""
        return [name for name, entry in self._entries.items() if trait in entry.traits]

    def unknown(self, name: str) -> str:
        """The message for a name that is not registered."""
        there = f"There is {', '.join(self)}." if len(self) else "None is registered."
        return f"there is no {self.kind} named {name!r}. {there}{nearest(name, self)}"

    def _check_free(self, name: str, definition: set[str]) -> None:
        """Checks that a name can be registered.

        What is defined again (a notebook's cell that is run again, a module that is loaded again) replaces itself.

        Raises:
            RegistryError: the name is empty or no text, or something else has it.
        """
        if not isinstance(name, str) or not name:
            raise RegistryError(f"`@{self.kind}` needs a name: `@{self.kind}('mine')`.")
        if name in self._imported_for and self._imported_for[name] not in sys.modules:
            importlib.import_module(self._imported_for[name])  # registers it
        taken = self._entries.get(name)
        if taken is not None and not taken.definition & definition:
            raise RegistryError(
                f"a {self.kind} named `{name}` is there already, registered at {taken.place}. Take another name."
            )


_REGISTRIES: dict[str, Registry[Any]] = {}


def registries() -> list[Registry[Any]]:
    """The registries that exist so far: each is created when its module is imported."""
    return list(_REGISTRIES.values())


def known_names(field: str, built_in: Collection[str]) -> tuple[str, ...]:
    """The names that a field takes: those of this package, and for some fields what has been registered as well."""
    registered = _REGISTRIES.get(KINDS.get(field, ""), ())
    return tuple({**dict.fromkeys(built_in), **dict.fromkeys(registered)})


def names_having(kind: str, trait: str, built_in: Collection[str]) -> set[str]:
    """The names of this package that have a trait, and those that have been registered with it."""
    registry = _REGISTRIES.get(kind)
    return {*built_in, *(() if registry is None else registry.having(trait))}


def unknown_name(kind: str, name: str) -> str | None:
    """The message for a name that no registry of that kind has; ``None`` where the name is known."""
    registry = _REGISTRIES.get(kind)
    if registry is None:
        return f"there is no {kind} named {name!r}. None is registered."
    return None if name in registry else registry.unknown(name)


def nearest(name: str, names: Collection[str]) -> str:
    """`` Did you mean `x`?``, or nothing when no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def made_once(thing: Any) -> Callable[[], Any]:
    """Returns a function that gives ``thing``; of a class, one object, created without arguments at the first call."""
    return functools.cache(lambda: thing() if inspect.isclass(thing) else thing)
