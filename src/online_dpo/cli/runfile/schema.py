"""Every field that a run file may hold: its type, default, choices and documentation, read from source text.

Importing :class:`transformers.TrainingArguments` takes seconds, so the classes are not imported here: their files are
parsed with :mod:`ast`. What a field accepts is therefore written once, where the class is defined.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from online_dpo.config.field_specs import FieldSpec, read_class

CONFIG = ("online_dpo.config.trainer_config", "OnlineDPOConfig")
"""Where the configuration stands: module and class. Its base classes hold its fields."""

PARENT = "transformers.TrainingArguments"
"""The group of the fields that transformers defines."""

WIDER_TYPES = {
    "resume_from_checkpoint": "bool | str | None",  # `true` and `auto`: the newest whole one
    "fsdp": "bool | str | None",  # transformers annotates only its legacy form
}


@cache
def load_fields() -> dict[str, FieldSpec]:
    """All fields by name: those of the run itself first, then Online DPO's, then the rest of ``TrainingArguments``."""
    run = read_fields_of("online_dpo.cli.runfile.run_config", "RunConfig", group="Run")
    ours = {}
    for module, class_name in config_classes():
        ours |= read_fields_of(module, class_name, group="Online DPO")
    enums = _training_enums()
    parents = {
        name: replace(
            spec, annotation=WIDER_TYPES.get(name, spec.annotation), choices=spec.choices or _enum(spec, enums)
        )
        for name, spec in read_class(_transformers_file("training_args.py"), "TrainingArguments", group=PARENT).items()
    }
    assert not run.keys() & (ours.keys() | parents.keys()), "a run field has the name of a training argument"
    return {**run, **ours, **{name: spec for name, spec in parents.items() if name not in ours}}


def config_classes() -> list[tuple[str, str]]:
    """Module and name of the classes that hold the fields of Online DPO, in the order of the fields: the base classes
    of the configuration that this package defines, as its source names and imports them, and the configuration itself.
    """
    module = ast.parse(_file_of(CONFIG[0]).read_text(encoding="utf-8"))
    imported = {
        name.name: node.module
        for node in module.body
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("online_dpo.")
        for name in node.names
    }
    [bases] = [node.bases for node in module.body if isinstance(node, ast.ClassDef) and node.name == CONFIG[1]]
    names = [base.id for base in reversed(bases) if isinstance(base, ast.Name)]
    return [*((imported[name], name) for name in names if name in imported), CONFIG]


def read_fields_of(module: str, class_name: str, group: str = "") -> dict[str, FieldSpec]:
    """The fields of a dataclass of this package, whose module is not imported (the packages around it are: they load
    nothing).
    """
    return read_class(_file_of(module), class_name, group=group)


def read_enums(path: Path) -> dict[str, tuple[str, ...]]:
    """The values of every ``ExplicitEnum`` that a file of transformers defines, by the enum's name."""
    enums = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
            members = (item.value for item in node.body if isinstance(item, ast.Assign))
            enums[node.name] = tuple(str(ast.literal_eval(value)) for value in members)
    return enums


def _file_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


def _transformers_file(name: str) -> Path:
    spec = importlib.util.find_spec("transformers")  # locates a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed. Install this package with: pip install online-dpo")
    return Path(spec.origin).parent / name


def _training_enums() -> dict[str, tuple[str, ...]]:
    return read_enums(_transformers_file("trainer_utils.py")) | read_enums(_transformers_file("training_args.py"))


def _enum(spec: FieldSpec, enums: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The values of the enum in ``IntervalStrategy | str``."""
    names = [name.strip() for name in spec.annotation.split("|")]
    return next((enums[name] for name in names if name in enums), ())
