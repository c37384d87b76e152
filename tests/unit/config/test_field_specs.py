"""What is read of a dataclass from its source: types, choices, documentation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
from transformers import HfArgumentParser

from online_dpo.cli.runfile.schema import config_classes
from online_dpo.config.checking import check_choice, check_choices
from online_dpo.config.field_specs import documented, read_class, specs_of

Colour = Literal["red", "green"]


@documented
@dataclass
class Base:
    """Three fields."""

    colour: Colour = "red"
    """Its colour."""

    shades: Colour | list[Colour] = "red"
    """Its shades."""

    border: Colour | None = None
    """Its border, if it has one."""


@documented
@dataclass
class Wider(Base):
    """Two more."""

    size: Literal["small", "large"] = "small"
    """Its size."""

    level: Literal[1, 2] = 1
    """No text."""

    name: str = "x"
    """Any text."""


def test_a_literal_of_texts_is_choices() -> None:
    specs = read_class(Path(__file__), "Wider", group="here") | read_class(Path(__file__), "Base", group="here")
    assert {name: (spec.annotation, spec.choices) for name, spec in specs.items()} == {
        "colour": ("str", ("red", "green")),
        "shades": ("str | list[str]", ("red", "green")),
        "border": ("str | None", ("red", "green")),
        "size": ("str", ("small", "large")),
        "level": ("Literal[1, 2]", ()),
        "name": ("str", ()),
    }
    assert (specs["size"].doc, specs["size"].default, specs["size"].group) == ("Its size.", "'small'", "here")


def test_a_class_has_the_fields_of_those_above_it() -> None:
    assert list(specs_of(Base)) == ["colour", "shades", "border"]
    assert list(specs_of(Wider)) == ["colour", "shades", "border", "size", "level", "name"]
    assert specs_of(dict) == {}


def test_parsers_are_told_the_choices() -> None:
    assert [field.metadata.get("choices") for field in dataclasses.fields(Wider)] == [
        *[["red", "green"]] * 3,
        *(["small", "large"], None, None),
    ]
    assert get_type_hints(Base)["colour"] is str
    parser = HfArgumentParser(Base)  # pyright: ignore[reportArgumentType]
    words = ["--colour", "green", "--shades", "red", "green", "--border", "red"]
    assert parser.parse_args_into_dataclasses(words) == (Base("green", ["red", "green"], "red"),)
    assert parser.parse_args_into_dataclasses([])[0].border is None
    for name in ("colour", "shades", "border"):
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses([f"--{name}", "blue"])


def test_choices_are_checked() -> None:
    for good in (Wider(), Wider(shades="green"), Wider(shades=["red", "green"], border="red", size="large")):
        check_choices(good)  # pyright: ignore[reportArgumentType]
    for bad, message in (
        (Wider(colour="gren"), "`colour` must be one of red, green; it is 'gren'. Did you mean `green`?"),  # pyright: ignore
        (Wider(shades=["red", "x"]), "`shades` must be one of red, green; it is 'x'."),  # pyright: ignore
        (Wider(size=None), "`size` must be one of small, large; it is None."),  # pyright: ignore
    ):
        with pytest.raises(ValueError) as caught:
            check_choices(bad)  # pyright: ignore[reportArgumentType]
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="`backend` must be one of a, b; it is 'c'"):
        check_choice("backend", "c", ["a", "b"])


def test_the_groups_of_the_configuration_are_its_base_classes() -> None:
    assert config_classes() == [
        ("online_dpo.config.training", "TrainingFields"),
        ("online_dpo.config.recording", "RecordingFields"),
        ("online_dpo.config.sampling", "SamplingFields"),
        ("online_dpo.config.data", "DataFields"),
        ("online_dpo.config.feedback", "FeedbackFields"),
        ("online_dpo.config.loss", "LossFields"),
        ("online_dpo.config.method", "MethodFields"),
        ("online_dpo.config.engine", "EngineFields"),
        ("online_dpo.config.vllm", "VLLMFields"),
        ("online_dpo.config.secrets", "WithoutToken"),  # which has no fields
        ("online_dpo.config.trainer_config", "OnlineDPOConfig"),
    ]


def test_groups_are_light() -> None:
    groups = [module for module, _ in config_classes() if not module.endswith("trainer_config")]
    light = [*groups, "online_dpo.config.llm_judge", "online_dpo.config.pairwise_judge", "online_dpo.config.hf_ranges"]
    heavy = {"torch", "transformers", "accelerate", "datasets"}
    code = f"import sys, {', '.join(light)}\nassert not {heavy} & {{*sys.modules}}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
