"""The JSON Schema of run files: it is current, and it accepts what a run file may hold."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from online_dpo.cli.main import main
from online_dpo.cli.runfile.json_schema import EXTENDABLE, field_schema, run_file_schema, schema_text
from online_dpo.cli.runfile.run_file import COUNTS, JSON_TEXTS
from online_dpo.cli.runfile.schema import PARENT, FieldSpec, load_fields
from online_dpo.cli.runfile.values import BadValue, convert
from online_dpo.config.hf_ranges import RANGES, out_of_range
from online_dpo.config.input import mapping_from_text
from online_dpo.config.requirements import TRACKERS
from online_dpo.quickstart.run import write_run_file
from support.processes import run_python

ROOT = Path(__file__).parents[4]
PACKAGE = ROOT / "src" / "online_dpo"
SHIPPED = PACKAGE / "run.schema.json"
FIELDS = load_fields()
SCHEMA = run_file_schema(FIELDS)
VALIDATOR = Draft202012Validator(SCHEMA)
RUN_FILES = [*sorted((ROOT / "recipes").glob("*.yaml")), PACKAGE / "quickstart" / "run.yaml"]
GOOD = {"model_name_or_path": "owner/model", "dataset_name": "owner/data", "reward_funcs": "rewards.py:brevity"}
VALUES = (
    *(None, True, False, 0, 1, -1, 7, 10**12, 0.5, 2.0, -0.25, 1e-7, math.inf),
    *("", "text", "true", "No", "off", "yes", "None", "5", " 5 ", "-3", "1e3", "1.0", "1_000", ".5", "5.", "5e-7"),
    *("+1.5E+2", "1e", "e5", "1__0", "_1", "0x10", "inf", "-Infinity", "nan", "1 2", '{"a": 1}', "[1]"),
    *("steps", "all", "wandb", "sigmoid", "bfloat16", "linear", "spawn"),
    *([], [1], [0.1, "1e-2"], ["text"], ["wandb", "none"], [1.5, None], [True], [[1]], ["x", 1], ["1e3"]),
    *({}, {"a": 1}, {"a": {"b": None}}),
)
"""What YAML gives, right for some fields and wrong for others."""


def accepts(fields: dict[str, Any]) -> bool:
    return VALIDATOR.is_valid({**GOOD, **fields})


def run_takes(spec: FieldSpec, value: Any) -> bool:
    """Whether a run file may hold it, as far as it has to do with this field alone."""
    try:
        taken = convert(spec, value)
        if spec.name in JSON_TEXTS and isinstance(taken, str):
            mapping_from_text(spec.name, taken)
    except (BadValue, ValueError):
        return False
    if spec.name == "report_to":
        names = taken if isinstance(taken, list) else [taken]
        return all(name in (None, "", "all", "none", *TRACKERS) for name in names)
    return not [*out_of_range({spec.name: taken})] and not (spec.name in COUNTS and taken is not None and taken < 1)


def test_the_shipped_schema_is_current():
    """Else: online-dpo schema > src/online_dpo/run.schema.json, with the version of transformers in constraints.txt."""
    shipped = json.loads(SHIPPED.read_text())
    if f"transformers=={importlib.metadata.version('transformers')}" in (ROOT / "constraints.txt").read_text().split():
        assert SHIPPED.read_text() == schema_text()
    ours = {name for name, spec in FIELDS.items() if spec.group != PARENT}
    assert len(ours) > 100
    for schema in (shipped, made := json.loads(schema_text())):
        schema["properties"] = {name: schema["properties"][name] for name in ours}
    assert shipped == made


def test_it_is_a_schema_and_holds_nothing_of_this_machine():
    Draft202012Validator.check_schema(SCHEMA)
    assert SHIPPED.read_text().isascii()
    for place in (str(Path.home()), sys.prefix, str(ROOT), "site-packages"):
        assert place not in schema_text()


def test_the_package_ships_every_file_that_is_no_code():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["online_dpo"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert SHIPPED in data and data <= shipped


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_run_files_of_the_repository_are_valid_and_name_it(path: Path):
    text = path.read_text()
    assert [*VALIDATOR.iter_errors(yaml.safe_load(text))] == []
    key, _, named = text.partition("\n")[0].partition("=")
    assert key == "# yaml-language-server: $schema" and (path.parent / named).resolve() == SHIPPED.resolve()


def test_the_quickstart_leaves_it_beside_its_run_file(tmp_path: Path):
    text = write_run_file(tmp_path).read_text()
    assert text.startswith("# yaml-language-server: $schema=run.schema.json\n")
    assert (tmp_path / "run.schema.json").read_bytes() == SHIPPED.read_bytes()
    assert VALIDATOR.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_accepts_what_a_run_file_accepts(name: str):
    spec = FIELDS[name]
    validator = Draft202012Validator({**SCHEMA["properties"][name], "$defs": SCHEMA["$defs"]})
    default = [] if spec.default is None or "(" in spec.default else [ast.literal_eval(spec.default)]
    for value in (*VALUES, *default, *spec.choices, *([choice] for choice in spec.choices)):
        limited = isinstance(value, str) and (name in RANGES or name in COUNTS)  # text has a form and no size
        open_ended = name in EXTENDABLE and isinstance(value, (str, list))
        if not limited and not open_ended and not (value == math.inf and name in RANGES):
            assert validator.is_valid(value) == run_takes(spec, value), value
    assert all(validator.is_valid(value) for value in default)


def test_what_a_schema_cannot_tell_of_numbers():
    """NaN and infinity are numbers to it, and of a number as text it sees the form alone."""
    assert accepts({"temperature": math.nan, "learning_rate": math.inf})
    assert accepts({"learning_rate": "-1e-5", "max_steps": "0"})
    assert accepts({"max_steps": "1.234e1"}) and not run_takes(FIELDS["max_steps"], "1.234e1")
    assert not accepts({"max_steps": "20e-1"}) and run_takes(FIELDS["max_steps"], "20e-1")


@pytest.mark.parametrize("name", [*RANGES, *COUNTS])
def test_a_number_stays_in_its_range(name: str):
    whole = "int" in FIELDS[name].annotation
    for value in (-2, -1, 0, 1, 2, 2**32 - 1, 2**32, *(() if whole else (-1e-9, 1e-9, 0.999, 1.5))):
        assert accepts({name: value}) == run_takes(FIELDS[name], value), value


def test_names_of_plugins_are_accepted_beside_plugins_alone_and_the_known_ones_proposed():
    mine = {"plugins": ["mine.py"]}
    for name in EXTENDABLE:
        schema = SCHEMA["properties"][name]
        assert schema["anyOf"][:2] == [{"enum": list(FIELDS[name].choices)}, {"type": "string"}]
        assert schema["description"].endswith("Plugins may add other names.")
        assert accepts({name: "mine", **mine}) and not accepts({name: 3, **mine})
        assert accepts({name: None, **mine}) is accepts({name: None}) is (name == "engine")
        for none in ({}, {"plugins": None}, {"plugins": []}):
            assert accepts({name: FIELDS[name].choices[-1], **none}) and not accepts({name: "mine", **none})
    assert accepts({"loss_type": ["sigmoid", "mine"], **mine}) and not accepts({"loss_type": ["sigmoid", 1], **mine})
    assert accepts({"loss_type": ["sigmoid", "sft"]}) and not accepts({"loss_type": ["sigmoid", "mine"]})
    assert not accepts({"tie_policy": "mine", **mine})


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        ("Literal['a', 'b']", {"enum": ["a", "b"]}),
        ("Literal['off', 'warn'] | None", {"anyOf": [{"enum": ["off", "warn"]}, {"type": "null"}, {"const": False}]}),
        (
            "Literal['a'] | list[Literal['a']]",
            {"anyOf": [{"enum": ["a"]}, {"type": "array", "items": {"enum": ["a"]}}]},
        ),
    ],
)
def test_choices_may_be_a_literal(annotation: str, schema: dict[str, Any]):
    assert field_schema(FieldSpec("f", annotation, None, "", group="")) == schema


def test_an_extendable_field_may_be_a_literal():
    spec = FieldSpec("method", "Literal['xpo']", "'xpo'", "How.", group="")
    assert field_schema(spec) == {
        "description": "How. Plugins may add other names.",
        "anyOf": [{"enum": ["xpo"]}, {"type": "string"}],
        "default": "xpo",
    }


def test_what_a_run_file_needs():
    assert accepts({}) and not accepts({"learning_rat": 1e-6}) and not accepts({"training": {"beta": 0.1}})
    for name in ("model_name_or_path", "dataset_name"):
        assert not VALIDATOR.is_valid({key: value for key, value in GOOD.items() if key != name})
    for nothing in (None, []):
        [error] = VALIDATOR.iter_errors({**GOOD, "reward_funcs": nothing})
        assert error.schema["errorMessage"].startswith("Nothing scores the completions.")
    assert accepts({"reward_funcs": None, "reward_model_path": "owner/reward"})
    assert accepts({"reward_funcs": [], "judge": "mine.py:judge"})


@pytest.mark.parametrize("judge", ["judge", "eval_judge"])
def test_a_judge_has_its_own_settings(judge: str):
    def with_settings(name: str | None, settings: Any) -> bool:
        return accepts({judge: name, f"{judge}_kwargs": settings})

    llm = {"model": "m", "votes": 3, "temperature": "1e-1", "max_cost": None, "extra": {"seed": 0}, "order": "random"}
    pairwise = {"template": "{prompt} {first} {second}", "letters": ["A", "B"], "batch_size": 8}
    assert with_settings("llm", llm) and with_settings("judges/mine", pairwise) and with_settings("judges/mine", None)
    assert with_settings("mine.py:judge", llm) and with_settings(None, llm)  # ignored, with a warning
    assert not accepts({judge: "llm"}) and not with_settings("llm", None) and not with_settings("llm", {"votes": 1})
    assert accepts({judge: "judges/mine"}) and accepts({f"{judge}_kwargs": {"votes": 1}})
    for wrong in ({"modle": "m"}, {"votes": 0}, {"order": "both ways"}, {"max_cost": 0}, {"input_price": -1}):
        assert not with_settings("llm", {**llm, **wrong}), wrong
    for wrong in ({"model": "m"}, {"batch_size": 0}, {"batch_size": None}):
        assert not with_settings("judges/mine", {**pairwise, **wrong}), wrong
    assert with_settings("llm", {**llm, "template": "mine.txt"}) and not with_settings("judges/mine", [1])


def test_the_command_prints_it_without_torch():
    code = (
        "import sys; from online_dpo.cli.main import main; code = main(['schema'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys(); sys.exit(code)"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, schema_text(), "")


def test_the_command_has_help_and_takes_nothing_else(capsys: pytest.CaptureFixture[str]):
    for words, code in ((["--help"], 0), (["run.yaml"], 2), (["--output", "x"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["schema", *words])
        said = capsys.readouterr()
        assert stop.value.code == code
        if code:
            assert said.out == "" and len(said.err.splitlines()) == 1
            assert said.err.startswith(f"error: unrecognized arguments: {' '.join(words)}.")
        else:
            assert "# yaml-language-server: $schema=run.schema.json" in " ".join(said.out.split())


def test_the_section_of_ray_has_its_settings_and_no_others():
    right = {"train_gpus": 8, "servers": "2", "server_args": ["--max-model-len", 4096], "address": None}
    assert accepts({"ray": right}) and accepts({"ray": {}}) and accepts({"ray": None})
    for wrong in ({"train_gpu": 8}, {"train_gpus": -1}, {"placement_timeout": 0}, {"env_vars": {"A": "b"}}, 5):
        assert not accepts({"ray": wrong}), wrong
