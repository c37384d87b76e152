"""The section ``ray`` of a run file, and its settings on the command line: ``--ray.servers 2``.

Nothing heavy may be imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from online_dpo.cli.runfile.entries import Entry, entry_value, read_overrides
from online_dpo.cli.runfile.schema import read_fields_of
from online_dpo.cli.runfile.values import BadValue
from online_dpo.cli.runfile.yaml_text import parse_yaml
from online_dpo.config.registry import nearest
from online_dpo.launch.commands import PLANNED, with_servers
from online_dpo.launch.settings import RaySettings, settings_problems, start_problems

SECTION = "ray"
PREFIX = f"{SECTION}."
NAME = ("online_dpo.launch.settings", "RaySettings")
"""Where the settings stand: module and class."""
SAMPLES_ELSEWHERE = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "engine")


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without those for the section, and these.

    >>> split_settings(["--max_steps", "5", "--ray.servers", "2", "--beta=0.1"])
    (['--max_steps', '5', '--beta=0.1'], ['--ray.servers', '2'])
    """
    others: list[str] = []
    own: list[str] = []
    goes_to = others
    for word in words:
        if word.startswith("--"):
            goes_to = own if word[2:].startswith(PREFIX) else others
        goes_to.append(word)
    return others, own


def read_section(
    entries: dict[str, Entry], file: str, on_cluster: bool, problems: list[str]
) -> tuple[dict[str, Entry], RaySettings]:
    """Read the settings; return the entries of the other fields and them. Problems are added to ``problems``.

    Args:
        file: the place of what is missing.
        on_cluster: the settings are used. The run then samples from the servers that they ask for.
    """
    own = _merged(entries)
    others = {name: entry for name, entry in entries.items() if not name.startswith(PREFIX)}
    settings = _converted(own, problems)
    problems.extend(_placed(settings_problems(settings), own, file))
    if on_cluster:
        problems.extend(_placed(start_problems(settings), own, file))
        problems.extend(_contradictions(settings, others))
        others |= read_overrides(with_servers([PLANNED] * settings.servers), [])
    return others, settings


def _merged(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The settings by name, each with its place: those of the section, and over them those with a name like
    ``ray.servers``.
    """
    dotted = {name.removeprefix(PREFIX): entry for name, entry in entries.items() if name.startswith(PREFIX)}
    section = entries.get(SECTION)
    if section is None:
        return dotted
    try:  # `--ray '{servers: 2}'`; what is no mapping is reported with the other fields
        given = section.value if section.words is None else parse_yaml(" ".join(section.words))
    except yaml.YAMLError:
        given = None
    found = {str(name): Entry(section.where, value) for name, value in given.items()} if isinstance(given, dict) else {}
    return found | dotted


def _converted(own: Mapping[str, Entry], problems: list[str]) -> RaySettings:
    """The settings in their types. What is unknown or wrong is added to ``problems``."""
    specs = read_fields_of(*NAME)
    values: dict[str, Any] = {}
    for name, entry in own.items():
        if name not in specs:
            near = nearest(name.replace("-", "_"), specs)
            known = "" if near else f" There are: {', '.join(specs)}."
            problems.append(f"{entry.where}: `{PREFIX}{name}` is not a setting.{near}{known}")
            continue
        try:
            values[name] = entry_value(specs[name], entry)
        except BadValue as problem:
            problems.append(f"{entry.where}: `{PREFIX}{name}` {problem}")
    return RaySettings(**values)


def _placed(found: Iterable[tuple[str, str]], own: Mapping[str, Entry], file: str) -> Iterator[str]:
    for name, problem in found:
        yield f"{own[name].where if name in own else file}: `{PREFIX}{name}` {problem}"


def _contradictions(settings: RaySettings, others: Mapping[str, Entry]) -> Iterator[str]:
    """Fields that say from whom the run samples, beside servers that are started for it."""
    for name in SAMPLES_ELSEWHERE if settings.servers else ():
        if name in others and not _is_servers_engine(name, others[name]):
            yield (
                f"{others[name].where}: `{name}` is given beside `{PREFIX}servers`, which starts the servers that the "
                "run samples from. Leave one of them out."
            )


def _is_servers_engine(name: str, entry: Entry) -> bool:
    given = entry.value if entry.words is None else " ".join(entry.words)
    return name == "engine" and given in (None, "vllm_server")
