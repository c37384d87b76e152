"""Makes ``docs/reference/configuration.md``: every field that this package defines, a table for each group.

``python -m online_dpo.cli.runfile.configuration_page > docs/reference/configuration.md``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from online_dpo.cli.runfile.help import GROUPS, USUAL
from online_dpo.cli.runfile.ray_section import NAME as RAY_SETTINGS
from online_dpo.cli.runfile.ray_section import PREFIX
from online_dpo.cli.runfile.schema import PARENT, FieldSpec, load_fields, read_fields_of

INTRODUCTION = """\
# Configuration

<!-- Made from the fields themselves by `make pages`: change their documentation there. -->

Every field that this package defines, as `online-dpo train --help-all` shows them. In a run file a field is one
`name: value`; on the command line it is `--name value`, which wins. In Python they are arguments of `OnlineDPOConfig`,
except those marked with \\*, which only run files and the command line have."""

ENDING = f"""\
## {PARENT}

All of its other fields count as well; `online-dpo train --help-all` shows those of the installed version. Most runs
set some of these: {", ".join(f"`{name}`" for name in USUAL)}.
"""

RAY_INTRODUCTION = """\
They stand in the section `ray` of a run file, and `online-dpo ray` reads them; on the command line `--ray.servers 2`.
See [Clusters](../guides/clusters.md)."""

HEADER = """\
| field | type | default | choices | meaning |
|---|---|---|---|---|"""


def configuration_page(fields: Mapping[str, FieldSpec]) -> str:
    """The page in Markdown."""
    return "\n".join([INTRODUCTION, "", *_groups(fields), *_settings_of_ray(), ENDING])


def _settings_of_ray() -> Iterator[str]:
    yield f"## Settings of `ray`\n\n{RAY_INTRODUCTION}\n\n{HEADER}"
    yield from (_row(replace(spec, name=PREFIX + name)) for name, spec in read_fields_of(*RAY_SETTINGS).items())
    yield ""


def _groups(fields: Mapping[str, FieldSpec]) -> Iterator[str]:
    for group, what in GROUPS.items():
        yield f"## {group}\n\n{what[0].upper()}{what[1:]}.\n\n{HEADER}"
        yield from (_row(spec) for spec in fields.values() if spec.section == group)
        yield ""


def _row(spec: FieldSpec) -> str:
    mark = "*" if spec.group == "Run" else ""
    default = "required" if spec.required else _code(spec.default)
    choices = ", ".join(map(_code, spec.choices))
    cells = (f"`{spec.name}`{mark}", _code(spec.annotation), default, choices, " ".join(spec.doc.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(text: str | None) -> str:
    return f"`{text}`" if text is not None else ""


if __name__ == "__main__":
    print(configuration_page(load_fields()), end="")
