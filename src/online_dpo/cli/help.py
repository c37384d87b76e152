"""The text of ``online-dpo train --help``: every field with its type, default and documentation."""

from __future__ import annotations

import textwrap

from online_dpo.cli.schema import FieldSpec, load_fields

USAGE = """\
usage: online-dpo train [run.yaml] [--field value ...] [--traceback]

Train a model. Fields stand in the YAML file, one `name: value` a line; those on the command line win.

  --traceback  show where in the code an error came from
  --help       show this text
"""


def train_help() -> str:
    parts = [USAGE]
    group = ""
    for spec in load_fields().values():
        if spec.group != group:
            group = spec.group
            parts.append(f"{group} fields:\n")
        parts.append(_entry(spec))
    return "\n".join(parts)


def _entry(spec: FieldSpec) -> str:
    state = "required" if spec.required else f"default {spec.default}" if spec.default is not None else ""
    facts = "; ".join(fact for fact in (spec.annotation, state) if fact)
    choices = f" One of: {', '.join(spec.choices)}." if spec.choices else ""
    doc = textwrap.fill(
        " ".join((spec.doc + choices).split()), width=100, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return f"  --{spec.name}  ({facts})\n{doc}\n" if doc else f"  --{spec.name}  ({facts})\n"
