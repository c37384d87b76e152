"""``plugins`` of a run file: Python files and modules that register losses, engines and the like.

They are imported before the run is built, but after everything else has been checked. Heavy packages must not be
imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from online_dpo.cli.runfile.entries import Entry, UsageError, entry_value
from online_dpo.cli.runfile.references import ModuleReference, load_module
from online_dpo.cli.runfile.schema import FieldSpec
from online_dpo.cli.runfile.values import BadValue
from online_dpo.config.registry import KINDS, known_names, unknown_name

FIELD = "plugins"


@dataclass(frozen=True)
class Plugin:
    """A file or module to import, and its place in the run file or on the command line."""

    where: str
    module: ModuleReference


@dataclass(frozen=True)
class RegisteredName:
    """A reward or judge that is given by the name under which a plugin registers it.

    >>> RegisteredName("run.yaml:4", field="reward_funcs", kind="reward", text="brevity")
    """

    where: str
    field: str
    kind: str
    text: str


@dataclass(frozen=True)
class Plugins:
    """The plugins of a run, and the names that can be checked only after they have been imported.

    ``entries`` and ``specs`` are fields to whose choices plugins may add, and their specifications. ``names`` are
    rewards and judges.
    """

    modules: tuple[Plugin, ...] = ()
    entries: Mapping[str, Entry] | None = None
    specs: Mapping[str, FieldSpec] | None = None
    names: tuple[RegisteredName, ...] = ()

    def load(self) -> None:
        """Import the plugins, and then check the names.

        Raises:
            ValueError: a plugin cannot be imported; the cause is chained.
            UsageError: names are not registered; it lists all of them.
        """
        for plugin in self.modules:
            try:
                load_module(plugin.module)
            except ValueError as problem:
                raise ValueError(f"{plugin.where}: `{FIELD}`: {problem}") from problem.__cause__
        if problems := list(self._problems()):
            raise UsageError(problems)

    def _problems(self) -> Iterator[str]:
        for name, entry in (self.entries or {}).items():
            assert self.specs is not None
            spec = self.specs[name]
            try:
                entry_value(replace(spec, choices=known_names(name, spec.choices)), entry)
            except BadValue as problem:
                yield f"{entry.where}: `{name}` {problem}"
        for name in self.names:
            if problem := unknown_name(name.kind, name.text):
                yield f"{name.where}: `{name.field}`: {problem}"


def are_given(entries: Mapping[str, Entry]) -> bool:
    """Whether a run file or the command line gives plugins."""
    return FIELD in entries and entries[FIELD].value != [] and entries[FIELD].words != ()


def checked_later(specs: Mapping[str, FieldSpec]) -> dict[str, FieldSpec]:
    """The fields as they are checked before plugins are imported: fields that plugins may extend accept any text."""
    return {name: replace(spec, choices=()) if name in KINDS else spec for name, spec in specs.items()}
