"""No field takes a number that no run can use: one line names the field, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from online_dpo import OnlineDPOConfig
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config.hf_ranges import absurd
from online_dpo.config.input import number_fields
from online_dpo.config.llm_judge import JudgeSettings
from support.configuration import made, refused

ABSURD = (math.nan, math.inf, -math.inf, 1e308, -1e308, 10**30, -(10**30), 10**5000)
NUMBERS = number_fields(OnlineDPOConfig)
MAY_BE_MINUS_1 = {
    "max_steps": "by epochs",
    "save_total_limit": "no limit",
    "local_rank": "no rank",
    "reward_weights": "a penalty",
}
READ_WITH_VLLM_ALONE = [name for name in NUMBERS if name.startswith("vllm_")]
NEEDS_ANOTHER = {"num_train_epochs": {"max_steps": -1}, "label_smoothing": {}}


def as_given(name: str, value: float) -> Any:
    return [value] if name in ("reward_weights", "loss_weights") else value


def test_the_fields_are_found_by_their_types() -> None:
    assert len(NUMBERS) > 55
    whole = {"num_completions": True, "seed": True, "learning_rate": False, "beta": False, "save_steps": False}
    assert {name: NUMBERS[name] for name in whole} == whole
    assert not NUMBERS.keys() & {"loss_type", "bf16", "generation_kwargs", "output_dir"}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_field_takes_no_absurd_number(name: str) -> None:
    for value in ABSURD:
        if (name, value) == ("max_grad_norm", math.inf):  # measures the norm, and never clips
            assert made(max_grad_norm=math.inf).max_grad_norm == math.inf
            continue
        with pytest.raises(ValueError, match=f"`{name}`") as caught:
            made(**{name: as_given(name, value)})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("name", NUMBERS)
def test_a_field_takes_no_negative_number_without_a_meaning(name: str) -> None:
    beside = {"use_vllm": True} if name in READ_WITH_VLLM_ALONE else {}
    if name in MAY_BE_MINUS_1:
        assert getattr(made(**{name: as_given(name, -1)}), name) == as_given(name, -1)
        return
    with pytest.raises(ValueError, match=f"`{name}`"):
        made(**beside, **{name: as_given(name, -1)})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_field_takes_no_switch_and_no_text_for_a_number(name: str) -> None:
    for value in (True, "many", object()):
        with pytest.raises(ValueError, match=f"`{name}` must (be a (whole )?number; it is|hold numbers; it holds) "):
            made(**{name: value})


def test_numbers_in_other_forms_are_what_they_mean() -> None:
    args = made(learning_rate="1e-6", max_steps=1e2, num_completions="4", save_steps="5", beta="0.2")
    values = (args.learning_rate, args.max_steps, args.num_completions, args.save_steps, args.beta)
    assert values == (1e-6, 100, 4, 5, 0.2)
    refused("`num_completions` must be a whole number; it is 2.5.", num_completions=2.5)
    refused("`learning_rate` must be above 0, and finite; it is inf.", learning_rate="1e400", weight_decay=0.0)


def test_where_absurd_begins() -> None:
    assert made(learning_rate=100).learning_rate == 100
    refused("`learning_rate` must be at most 100; it is 1000000000.0.", learning_rate=1e9)
    refused("`beta` must be at most 1000; it is 1000.5.", beta=[0.1, 1000.5])
    refused(
        "`gradient_accumulation_steps` must be at most 1000000; it is 1000000000000.",
        **{"gradient_accumulation_steps": 10**12},
    )
    refused("`save_steps` must be at most 1000000000; it is a number of about 400 digits.", save_steps=10**400)
    assert made(save_steps=10**9, logging_steps=10**9, eval_steps=10**9).save_steps == 10**9
    refused("`temperature` must be a finite number; it is inf.", generation_kwargs={"temperature": math.inf})
    refused("`top_p` must be a number; it is 'most'.", generation_kwargs={"top_p": "most"})


def test_a_list_is_looked_through_and_what_is_no_number_is_left_to_others() -> None:
    given = {"beta": [0.1, math.nan], "loss_type": "ipo", "bf16": True, "min_p": None, "top_k": 5, "reward_weights": []}
    assert [*absurd(given)] == [("beta", "must be a finite number; it is nan.")]


def problems(folder: Path, text: str, *words: str) -> list[str]:
    run_file = folder / "run.yaml"
    run_file.write_text(text)
    with pytest.raises(UsageError) as caught:
        plan_run(run_file, words)
    return [problem for problem in caught.value.problems if "is missing" not in problem]


@pytest.mark.parametrize("text", ["nan", ".nan", "1e400", ".inf", "-.inf", "-1e400", "1e308", str(10**30), "-1e308"])
def test_a_run_file_and_a_command_line_refuse_them_with_their_place(tmp_path: Path, text: str) -> None:
    run = {name for name, spec in load_fields().items() if spec.group == "Run"}
    fields = [name for name, spec in load_fields().items() if name in NUMBERS or (name in run and "lora" in name)]
    numeric = [name for name in fields if set(load_fields()[name].annotation.split(" | ")) & {"int", "float"}]
    assert {"lora_r", "lora_alpha", "lora_dropout", "learning_rate", "max_steps"} <= set(numeric)
    numeric.remove("max_grad_norm")
    found = problems(tmp_path, "".join(f"{name}: {text}\n" for name in numeric))
    for line, name in enumerate(numeric, start=1):
        assert [one for one in found if f"run.yaml:{line}: `{name}` " in one], (name, found)
    for name in ("max_grad_norm", *numeric) if "inf" not in text and "400" not in text else ():
        problem, *_ = [one for one in problems(tmp_path, "run_name: one\n", f"--{name}={text}") if f"`{name}`" in one]
        assert problem.startswith("command line"), problem


@pytest.mark.parametrize("name, value", [("lora_r", 0), ("lora_r", -1), ("lora_r", 10**9), ("lora_alpha", 0)])
def test_a_rank_that_no_adapter_has(tmp_path: Path, name: str, value: int) -> None:
    [problem] = [one for one in problems(tmp_path, f"{name}: {value}\n") if name in one]
    assert f"`{name}` is {value}; wanted: 1 or more." in problem or "must be at most 65536" in problem


def test_a_schedule_whose_learning_rate_is_no_number() -> None:
    refused(
        "The schedule `polynomial` gives a learning rate that is no finite number. Check `lr_scheduler_kwargs`",
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": math.nan},
    )


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_settings_of_a_schedule_that_has_none(name: str) -> None:
    refused(f"the schedule `{name}` has no settings", lr_scheduler_type=name, lr_scheduler_kwargs={"power": 2})


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, 1e308])
def test_settings_of_a_judge_are_no_exception(value: float) -> None:
    for name in ("temperature", "request_timeout", "max_cost", "concurrency", "requests_per_minute"):
        with pytest.raises(ValueError, match=f"`{name}` must be "):
            JudgeSettings(model="m", **{name: value})
