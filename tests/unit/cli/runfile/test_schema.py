"""The fields of a run file are those of the classes that they are read from."""

from __future__ import annotations

import dataclasses
from typing import get_args

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.schema import WIDER_TYPES, load_fields
from online_dpo.config.feedback import PairSelection
from online_dpo.config.loss import LossType
from online_dpo.config.trainer_config import OnlineDPOConfig

FIELDS = load_fields()


def test_fields_are_those_of_the_classes() -> None:
    classes = {field.name for cls in (RunConfig, OnlineDPOConfig) for field in dataclasses.fields(cls) if field.init}
    assert set(FIELDS) == classes


def test_plain_defaults_are_those_of_the_classes() -> None:
    compared = 0
    for field in dataclasses.fields(OnlineDPOConfig):
        text = FIELDS[field.name].default
        if text is not None and field.default is not dataclasses.MISSING:
            value = eval(text, {})  # source text of a literal
            assert value == field.default, field.name
            compared += 1
    assert compared > 120


def test_every_field_of_ours_is_documented_and_has_a_type_that_is_understood() -> None:
    ours = [spec for spec in FIELDS.values() if spec.group != "transformers.TrainingArguments"]
    assert [spec.name for spec in ours if not spec.doc] == []
    assert FIELDS["beta"].doc.startswith("Strength of the pull towards the reference")
    assert FIELDS["seed"].doc == "Random seed that will be set at the beginning of training."
    known = {"int", "float", "bool", "str", "None", "list", "dict", "Literal"}
    unknown = {
        spec.name
        for spec in FIELDS.values()
        if not known & {part.split("[")[0].strip() for part in spec.annotation.split("|")} - {"None"}
    }
    assert unknown == {"parallelism_config"}


def test_choices_come_from_the_classes() -> None:
    assert FIELDS["loss_type"].choices == get_args(LossType)
    assert FIELDS["pair_selection"].choices == get_args(PairSelection)
    assert FIELDS["tie_policy"].choices == ("skip", "first")
    assert FIELDS["overoptimisation"].choices == ("off", "warn", "stop")
    assert FIELDS["invalid_prompts"].choices == ("error", "filter")
    assert FIELDS["eval_strategy"].choices == tuple(item.value for item in IntervalStrategy)
    assert FIELDS["lr_scheduler_type"].choices == tuple(item.value for item in SchedulerType)
    assert FIELDS["train_sampling_strategy"].choices == ("random", "sequential", "group_by_length", "batch_rebalance")
    assert FIELDS["output_dir"].choices == ()


def test_widened_fields_exist() -> None:
    assert set(WIDER_TYPES) <= {field.name for field in dataclasses.fields(TrainingArguments)}
