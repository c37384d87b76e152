"""Reads the fields of a run file and of a command line, each with its place for messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from online_dpo.cli.runfile.schema import FieldSpec
from online_dpo.cli.runfile.values import BadValue, convert, convert_words
from online_dpo.cli.runfile.yaml_text import StrictLoader
from online_dpo.config.names_elsewhere import CALLED_HERE, hint_for

COMMAND_LINE = "command line"
MAX_BYTES = 2**20
"""Size of a run file."""
MAX_FIELDS = 1000
"""Fields of a run file: there are about 300."""
_LONG_DASH = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63\uff0d-]*[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]-*[A-Za-z]")
"""An option that begins with a dash of a text processor in place of hyphens."""


class UsageError(Exception):
    """The user's input is wrong. ``problems`` has one line for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Entry:
    """One given field: its place (``run.yaml:4``), and its value, or its words on the command line."""

    where: str
    value: Any = None
    words: tuple[str, ...] | None = None


def read_run_file(path: Path, problems: list[str]) -> dict[str, Entry]:
    """Read the top level of a YAML mapping, with line numbers. Duplicate keys, at any depth, are added to ``problems``.

    Raises:
        UsageError: the file is missing, empty, not YAML, or not a mapping, so that nothing else can be checked.
    """
    if path.is_dir():
        raise UsageError([f"{path}: this is a folder. Give the run file in it."])
    if not path.is_file():
        is_pipe = path.exists()
        what = "this is a pipe or a device. Copy its content to a file." if is_pipe else "there is no such file."
        raise UsageError([f"{path}: {what}"])
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError([f"{path}: the file has {path.stat().st_size} bytes. A run file has at most {MAX_BYTES}."])
        loader = StrictLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise UsageError([f"{path}: the file is empty. It needs at least `model_name_or_path` and `dataset_name`."])
        if not isinstance(node, yaml.MappingNode):
            raise UsageError([f"{path}: wanted: a mapping of fields, one `name: value` a line."])
        problems.extend(f"{path}:{line}: `{key}` stands twice. Leave one out." for key, line in _duplicates(node, []))
        loader.flatten_mapping(node)  # `<<: *defaults`
        if len(node.value) > MAX_FIELDS:
            raise UsageError([f"{path}: there are {len(node.value)} fields. A run file has at most {MAX_FIELDS}."])
        named = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        if len(named) < len(node.value):
            problems.append(f"{path}: a list or a mapping stands where the name of a field is wanted.")
        return {
            key.value: Entry(f"{path}:{key.start_mark.line + 1}", loader.construct_object(value, deep=True))
            for key, value in named
        }
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        hint = " Indent with blanks, not with tabs." if "'\\t'" in str(problem.problem) else ""
        raise UsageError([f"{path}:{line}: no valid YAML: {problem.problem}.{hint}"]) from None
    except UnicodeDecodeError:
        raise UsageError([f"{path}: the text is not in UTF-8. Save it as UTF-8."]) from None
    except yaml.YAMLError as problem:
        raise UsageError([f"{path}: no valid YAML: {' '.join(str(problem).split())}"]) from None
    except OSError as problem:
        raise UsageError([f"{path}: cannot be read: {problem.strerror}."]) from None


def read_overrides(words: Sequence[str], problems: list[str]) -> dict[str, Entry]:
    """Read fields on the command line: ``--a value``, ``--a=value``, ``--a b c`` (a list), ``--a`` (true).

    A hyphen in a name is an underscore. A field that is given twice has its last value. Words that belong to no field
    are added to ``problems``.
    """
    entries: dict[str, Entry] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            entries[name] = Entry(COMMAND_LINE, words=(value,) if equals else ())
        elif _LONG_DASH.match(word):
            problems.append(f"{COMMAND_LINE}: `{word}` begins with a long dash. Fields have two hyphens: --field.")
            name = word
        elif re.match("-[A-Za-z]", word):  # not a negative number: taking it for a value would hide a mistake
            problems.append(f"{COMMAND_LINE}: what is `{word}`? Fields have two hyphens: --field value.")
            name = word  # the values after it belong to it
        elif name in entries:
            entries[name] = Entry(COMMAND_LINE, words=(*(entries[name].words or ()), word))
        elif not name:
            problems.append(f"{COMMAND_LINE}: what is `{word}`? Fields are given as --field value.")
    return entries


def read_values(
    entries: dict[str, Entry],
    specs: dict[str, FieldSpec],
    problems: list[str],
    help_command: str,
    called_here: Mapping[str, str] = CALLED_HERE,
) -> dict[str, Any]:
    """Convert entries to the types of their fields. Unknown fields and wrong values are added to ``problems``."""
    values: dict[str, Any] = {}
    for name, entry in entries.items():
        spec = specs.get(name)
        if spec is None:
            hint = _nested_hint(entry, specs, called_here) or hint_for(name, specs, called_here)
            problems.append(f"{entry.where}: `{name}` is not a field.{hint or f' See: {help_command}'}")
            continue
        try:
            values[name] = entry_value(spec, entry)
        except BadValue as problem:
            problems.append(f"{entry.where}: `{name}` {problem}")
    return values


def _nested_hint(entry: Entry, specs: Collection[str], called_here: Mapping[str, str]) -> str:
    """A hint if fields stand inside of an unknown one, else nothing."""
    nested = [key for key in _keys(entry.value) if key in specs or key in called_here]
    if not nested:
        return ""
    here = nested[0] if nested[0] in specs else called_here[nested[0]]
    return f" Fields are not nested: write `{here}: ...` at the left margin."


def _keys(value: Any) -> Iterator[str]:
    """All keys of a mapping and of the mappings inside it."""
    for key, item in value.items() if isinstance(value, dict) else ():
        yield str(key)
        yield from _keys(item)


def entry_value(spec: FieldSpec, entry: Entry) -> Any:
    """The value of an entry in its field's type.

    Raises:
        BadValue: the field takes no such value.
    """
    return convert(spec, entry.value) if entry.words is None else convert_words(spec, list(entry.words))


def _duplicates(node: yaml.Node, inside: list[yaml.Node]) -> Iterator[tuple[str, int]]:
    """Duplicate keys of a mapping, each with the line of the second one; ``inside`` are the nodes around this one."""
    if node in inside:  # a node that contains itself: `&a [*a]`
        return
    inside = [*inside, node]
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key.value, key.start_mark.line + 1
                seen.add(key.value)
            yield from _duplicates(value, inside)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, inside)
