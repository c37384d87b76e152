"""Values of a run file and words of the command line: what is taken, and what each wrong one gets."""

from __future__ import annotations

from typing import get_args

import pytest

from online_dpo.cli.runfile.schema import FieldSpec, load_fields
from online_dpo.cli.runfile.values import BadValue, convert, convert_words
from online_dpo.config.loss import LossType

FIELDS = load_fields()


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("learning_rate", "1e-4", 1e-4),  # YAML reads 1e-4 as text
        ("learning_rate", 1, 1),
        ("max_steps", "1e2", 100),
        ("max_steps", 100.0, 100),
        ("beta", 0.1, [0.1]),
        ("beta", ["1e-1", 1], [0.1, 1]),
        ("use_cpu", "yes", True),
        ("use_cpu", "Off", False),
        ("eval_strategy", False, "no"),  # YAML reads no as false
        ("overoptimisation", False, "off"),  # and off
        ("report_to", ["a", "b"], ["a", "b"]),
        ("report_to", "none", "none"),
        ("max_length", None, None),
        ("resume_from_checkpoint", True, True),
        ("generation_kwargs", {"a": 1}, {"a": 1}),
        ("trackio_static_space_id", False, False),
        ("reward_funcs", "a.py:f", ["a.py:f"]),
    ],
)
def test_values_that_are_taken(name: str, given: object, meant: object) -> None:
    converted = convert(FIELDS[name], given)
    assert converted == meant
    assert type(converted) is type(meant)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("learning_rate", "fast", "is 'fast'; wanted: a number."),
        ("learning_rate", float("nan"), "is nan; wanted: a number."),
        ("learning_rate", True, "is true; wanted: a number."),
        ("max_steps", 1.5, "is 1.5; wanted: a whole number."),
        ("max_steps", None, "is empty; wanted: a whole number."),
        ("max_length", "long", "is 'long'; wanted: a whole number or null."),
        ("use_cpu", 1, "is 1; wanted: true or false."),
        ("run_name", 2024, "is 2024; wanted: text or null. Write it in quotes."),
        ("beta", [0.1, "x"], "is [0.1, 'x']; wanted: a list of numbers."),
        ("tie_policy", "frist", "is 'frist'; wanted: one of skip, first. Did you mean `first`?"),
        (
            "loss_type",
            ["sigmoid", "stf"],
            f"is ['sigmoid', 'stf']; wanted: one of {', '.join(get_args(LossType))} or a list of these. "
            "Did you mean `sft`?",
        ),
        ("generation_kwargs", [1], "is [1]; wanted: a mapping or text or null."),
        ("parallelism_config", {}, "is {}; wanted: null."),
    ],
)
def test_values_that_are_refused(name: str, given: object, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        convert(FIELDS[name], given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "words", "meant"),
    [
        ("learning_rate", ["1e-4"], 1e-4),
        ("use_cpu", [], True),
        ("use_cpu", ["false"], False),
        ("run_name", ["12"], "12"),
        ("run_name", ["#1"], "#1"),
        ("run_name", ["a: b"], "a: b"),
        ("run_name", ["null"], None),
        ("beta", ["0.1", "0.2"], [0.1, 0.2]),
        ("loss_type", ["sigmoid", "sft"], ["sigmoid", "sft"]),
        ("loss_type", ["[sigmoid, sft]"], ["sigmoid", "sft"]),
        ("loss_type", ["ipo"], "ipo"),
        ("beta", ["[0.1, 0.2]"], [0.1, 0.2]),
        ("generation_kwargs", ['{"min_new_tokens": 3}'], {"min_new_tokens": 3}),
        ("save_strategy", ["no"], "no"),
        ("max_grad_norm", ["-1"], -1),
    ],
)
def test_words_of_the_command_line(name: str, words: list[str], meant: object) -> None:
    assert convert_words(FIELDS[name], words) == meant


def test_words_that_are_refused() -> None:
    with pytest.raises(BadValue, match=r"^needs a value: a whole number\.$"):
        convert_words(FIELDS["max_steps"], [])
    with pytest.raises(BadValue, match=r"^takes one value, not 2: 1 2\.$"):
        convert_words(FIELDS["max_steps"], ["1", "2"])
    with pytest.raises(BadValue, match=r"^is 'x'; wanted: a whole number\.$"):
        convert_words(FIELDS["max_steps"], ["x"])


def test_literal_values() -> None:
    spec = FieldSpec("x", "Literal['a', 2]", None, "", group="")
    assert convert(spec, 2) == 2
    with pytest.raises(BadValue, match=r"wanted: \('a', 2\)"):
        convert(spec, "b")
