"""``online-dpo schema``: a JSON Schema of run files, with which editors complete and check them.

It is built from the same fields as ``train --help``, and accepts the values that
:func:`online_dpo.cli.runfile.values.convert` accepts. It checks each field alone, and the settings of a judge; all else
that depends on several fields or on the machine is checked when a run starts.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from online_dpo.cli.judging.plan import PAIRWISE_OPTIONS
from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.cli.runfile.plugins import FIELD
from online_dpo.cli.runfile.ray_section import NAME as RAY_SETTINGS
from online_dpo.cli.runfile.ray_section import SECTION
from online_dpo.cli.runfile.run_config import COUNTS
from online_dpo.cli.runfile.run_file import JSON_TEXTS, JUDGES, SCORERS
from online_dpo.cli.runfile.schema import FieldSpec, load_fields, read_fields_of
from online_dpo.cli.runfile.values import FALSE_WORDS, TRUE_WORDS, alternatives, type_name
from online_dpo.config.feedback import HUMAN
from online_dpo.config.hf_ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, RANGES, Range
from online_dpo.config.llm_judge import ABOVE_ZERO, AT_LEAST_ONE, LLM, NOT_NEGATIVE, TEMPLATES
from online_dpo.config.registry import KINDS
from online_dpo.config.requirements import TRACKERS
from online_dpo.launch.settings import COUNTS as RAY_COUNTS
from online_dpo.launch.settings import SECONDS as RAY_SECONDS

Schema = dict[str, Any]

EXTENDABLE = tuple(KINDS)
"""Fields to whose names plugins add."""
SUGGESTED = (*JUDGES, "template")
"""Fields that accept any text, such as a path, in addition to their choices."""
CHOICES_ELSEWHERE = {"report_to": ("none", "all", *TRACKERS, ""), **dict.fromkeys(JUDGES, (LLM, HUMAN))}
"""Choices of fields that are not defined with the field."""

DIGITS = r"\d(_?\d)*"
DECIMAL = rf"({DIGITS}\.?({DIGITS})?|\.{DIGITS})"
TEXTS_OF = {
    "int": {
        "title": "a whole number, as text such as 1e3",
        "type": "string",
        "pattern": rf"^\s*[-+]?({DIGITS}(\.0*)?|{DECIMAL}[eE]\+?\d{{1,2}})\s*$",
    },
    "float": {
        "title": "a number, as text such as 5e-7",
        "type": "string",
        "pattern": rf"^\s*[-+]?({DECIMAL}([eE][-+]?{DIGITS})?|[iI][nN][fF]([iI][nN][iI][tT][yY])?)\s*$",
    },
    "bool": {
        "title": "yes, no, on or off",
        "type": "string",
        "pattern": "^({})$".format(
            "|".join("".join(f"[{c}{c.upper()}]" for c in word) for word in sorted(TRUE_WORDS | FALSE_WORDS))
        ),
    },
}
"""Texts that are converted to numbers and booleans: YAML 1.1 reads ``5e-7`` as text, and YAML 1.2 ``yes``."""
ANY_TEXT = {"type": "string"}

DESCRIPTION = (
    "A run file of Online DPO. Fields can also be given on the command line, where they override those of the file: a "
    "field that is required here may be given there."
)


def print_schema(words: Sequence[str]) -> int:
    """Print the schema of run files for the installed version of transformers. Returns the exit code."""
    OneLineParser(
        prog="online-dpo schema",
        description="Print a JSON Schema of run files, by which editors complete and check them.",
        epilog="online-dpo schema > run.schema.json, and as the first line of run files beside it: "
        "# yaml-language-server: $schema=run.schema.json",
    ).parse_args(with_hyphens(list(words)))
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """The schema as JSON text, as it is printed and as it is stored in the package."""
    return json.dumps(run_file_schema(load_fields()), indent=1) + "\n"


def run_file_schema(fields: Mapping[str, FieldSpec]) -> Schema:
    """The schema of run files with these fields."""
    ranges = RANGES | dict.fromkeys(COUNTS, AT_LEAST_1)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": DESCRIPTION,
        **_mapping(fields, ranges),
        "allOf": [_scored(), *(_settings_of(name) for name in JUDGES), _known_names(fields), _section()],
        "$defs": {
            **{_text_of(name): text for name, text in TEXTS_OF.items()},
            **_judges(),
            SECTION: _settings_of_ray(),
        },
    }


def field_schema(spec: FieldSpec, allowed: Range | None = None) -> Schema:
    """The schema of one field: its values, its documentation and its default."""
    spec = replace(spec, choices=CHOICES_ELSEWHERE.get(spec.name, spec.choices))
    options = _options(spec.annotation, spec, allowed)
    if any(word in FALSE_WORDS for option in options for word in option.get("enum", ())):
        options.append({"const": False})  # YAML 1.1 reads `off` so
    return {**_documented(spec), **_any_of(options), **_default(spec)}


def _mapping(fields: Mapping[str, FieldSpec], ranges: Mapping[str, Range]) -> Schema:
    """A mapping that holds these fields and no others."""
    required = [spec.name for spec in fields.values() if spec.required]
    return {
        "type": "object",
        "properties": {name: field_schema(spec, ranges.get(name)) for name, spec in fields.items()},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _judges() -> dict[str, Schema]:
    """The settings of each kind of judge that this package brings."""
    settings = read_fields_of("online_dpo.config.llm_judge", "JudgeSettings")
    settings["template"] = replace(settings["template"], choices=TEMPLATES)
    limits = {AT_LEAST_ONE: AT_LEAST_1, ABOVE_ZERO: ABOVE_0, NOT_NEGATIVE: AT_LEAST_0}
    ranges = {name: allowed for names, allowed in limits.items() for name in names}
    counts = {name: AT_LEAST_1 for name, spec in PAIRWISE_OPTIONS.items() if spec.annotation == "int"}
    return {
        "llm_judge": {"description": "Settings of a language model as judge.", **_mapping(settings, ranges)},
        "pairwise_judge": {"description": "Options of a pairwise model.", **_mapping(PAIRWISE_OPTIONS, counts)},
    }


def _section() -> Schema:
    """What the section `ray` holds."""
    return {"properties": {SECTION: {"anyOf": [{"$ref": f"#/$defs/{SECTION}"}, {"type": "null"}]}}}


def _settings_of_ray() -> Schema:
    """The settings of the section `ray`."""
    ranges = dict.fromkeys(RAY_COUNTS, AT_LEAST_0) | dict.fromkeys(RAY_SECONDS, ABOVE_0)
    return {"description": "How a run is started on a Ray cluster.", **_mapping(read_fields_of(*RAY_SETTINGS), ranges)}


def _scored() -> Schema:
    """Something has to score the completions."""
    message = f"Nothing scores the completions. Give one of {', '.join(SCORERS)}."  # editors show it
    return {
        "if": {"properties": {name: {"enum": [None, []]} for name in SCORERS}},
        "then": {"const": None, "errorMessage": message},  # no run file is null
    }


def _known_names(fields: Mapping[str, FieldSpec]) -> Schema:
    """Without plugins there are only the names of this package."""
    specs = [replace(fields[name], name="") for name in EXTENDABLE]  # by their names they are open
    strict = {
        name: _any_of(_options(spec.annotation, spec, None)) for name, spec in zip(EXTENDABLE, specs, strict=True)
    }
    return {
        "if": {"properties": {FIELD: {"enum": [None, []]}}},
        "then": {"properties": strict},
    }


def _settings_of(judge: str) -> Schema:
    """What ``judge_kwargs`` holds, by the judge. One of the user's own, with a colon in its name, has none."""
    settings = f"{judge}_kwargs"
    pairwise = {"anyOf": [{"$ref": "#/$defs/pairwise_judge"}, {"type": "null"}]}
    return {
        "if": {"required": [judge], "properties": {judge: {"const": LLM}}},
        "then": {"required": [settings], "properties": {settings: {"$ref": "#/$defs/llm_judge"}}},
        "else": {
            "if": {"required": [judge], "properties": {judge: {"type": "string", "pattern": "^[^:]*$"}}},
            "then": {"properties": {settings: pairwise}},
        },
    }


def _options(annotation: str, spec: FieldSpec, allowed: Range | None) -> list[Schema]:
    """The schemas of an annotation, one for each of its alternatives."""
    kinds = alternatives(ast.parse(annotation, mode="eval").body)
    options = [option for kind in kinds for option in _of_kind(kind, spec, allowed)]
    if ANY_TEXT in options:  # any text includes the texts that mean a number or a boolean
        options = [option for option in options if "$ref" not in option]
    return [option for index, option in enumerate(options) if option not in options[:index]]


def _of_kind(kind: ast.expr, spec: FieldSpec, allowed: Range | None) -> list[Schema]:
    """A type as ``convert`` takes it; nothing for a class, which no run file can hold."""
    inside = ast.unparse(kind.slice) if isinstance(kind, ast.Subscript) else ""
    match type_name(kind):
        case "None":
            return [{"type": "null"}]
        case "bool":
            return [{"type": "boolean"}, _ref("bool")]
        case "int":
            return [*_numbers("integer", allowed), _ref("int")]
        case "float":
            return [*_numbers("number", allowed), _ref("float")]
        case "Literal":
            names = ast.literal_eval(inside)
            return _words(spec.name, names if isinstance(names, tuple) else (names,))
        case "str" if spec.name in JSON_TEXTS:
            return [{"title": "a mapping, as JSON text", "type": "string", "pattern": r"^\s*\{"}]
        case "str":
            return _words(spec.name, spec.choices)
        case "dict":
            return [{"type": "object"}]
        case "list":  # one value is a list of one
            items = _options(inside, spec, allowed)
            return [*items, {"type": "array", **({"items": _any_of(items)} if items else {"maxItems": 0})}]
        case _:
            return []


def _words(name: str, choices: Sequence[Any]) -> list[Schema]:
    """The names that a field takes. Where it takes others as well, these are the ones that an editor proposes."""
    is_open = not choices or name in EXTENDABLE + SUGGESTED
    return [*([{"enum": list(choices)}] if choices else []), *([ANY_TEXT] if is_open else [])]


def _numbers(kind: str, allowed: Range | None) -> list[Schema]:
    if allowed is None:
        return [{"type": kind}]
    ends = {"minimum": allowed.at_least, "exclusiveMinimum": allowed.above, "exclusiveMaximum": allowed.below}
    finite = {name: end for name, end in ends.items() if end is not None and math.isfinite(end)}
    return [{"type": kind, **finite}, *({"const": value} for value in allowed.also)]


def _any_of(options: list[Schema]) -> Schema:
    if len(options) == 1:
        return options[0]
    if options and all(option.keys() == {"type"} for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": options} if options else {"not": {}}


def _documented(spec: FieldSpec) -> Schema:
    note = " Plugins may add other names." if spec.name in EXTENDABLE else ""
    text = " ".join((spec.doc + note).split())
    return {"description": text} if text else {}


def _default(spec: FieldSpec) -> Schema:
    """The default, where it is a plain value. Null is left out: it means nothing, and editors would write it."""
    try:
        default = None if spec.default is None else ast.literal_eval(spec.default)
    except ValueError:  # an expression
        default = None
    return {} if default is None else {"default": default}


def _text_of(kind: str) -> str:
    return f"{kind}_as_text"


def _ref(kind: str) -> Schema:
    return {"$ref": f"#/$defs/{_text_of(kind)}"}
