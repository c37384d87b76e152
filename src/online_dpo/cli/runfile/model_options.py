"""Options for loading the policy, with the field names of TRL's ``ModelConfig``: checked, and turned into
``model_init_kwargs``.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from online_dpo.config import requirements
from online_dpo.config.quantization import NEEDS_ADAPTER, quantised_as, settings_problems

PLAIN = {"dtype": "dtype", "attn_implementation": "attn_implementation", "model_revision": "revision"}
"""Fields that are passed to ``from_pretrained`` unchanged, and the name of the argument."""
QUANTISATION = ("load_in_4bit", "load_in_8bit")
OF_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
COMPUTED_IN = "bfloat16"


def model_init_kwargs(values: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Join the run's ``model_init_kwargs`` with the arguments that other fields give, except the fields ``without``.

    >>> model_init_kwargs({"dtype": "bfloat16", "model_init_kwargs": {"revision": "v2"}})
    {'dtype': 'bfloat16', 'revision': 'v2'}
    """
    options = {PLAIN[name]: values[name] for name in PLAIN if values.get(name) is not None and name not in without}
    quantised = next((name for name in QUANTISATION if values.get(name)), None)
    if quantised is not None:
        options["quantization_config"] = {"quant_method": "bitsandbytes", quantised: True}
    if quantised == "load_in_4bit":
        options["quantization_config"] |= {
            "bnb_4bit_quant_type": values.get("bnb_4bit_quant_type", "nf4"),
            "bnb_4bit_compute_dtype": _computed_in(values),
            "bnb_4bit_use_double_quant": values.get("use_bnb_nested_quant", False),
            "bnb_4bit_quant_storage": values.get("bnb_4bit_quant_storage"),
        }
    return {**options, **(values.get("model_init_kwargs") or {})}


def model_problems(values: Mapping[str, Any], is_trained: bool) -> Iterator[tuple[str, str]]:
    """Check the options; yield for each problem the field and the rest of the message. ``is_trained``: weights of this
    model are to be trained.
    """
    given = values.get("model_init_kwargs") or {}
    for name, argument in PLAIN.items():
        both = [key for key in (argument, f"torch_{argument}") if key in given]
        if values.get(name) is not None and both:
            yield name, f"is given beside `{both[0]}` in `model_init_kwargs`. Give one of them."
    attention = values.get("attn_implementation")
    if attention is not None:
        needs = requirements.KERNELS if "/" in attention else requirements.ATTENTION.get(attention)
        if needs is not None and needs.missing:
            yield "attn_implementation", f"{attention!r} needs {needs.missing[0]}. Install it with: {needs.install}"
    quantised = [name for name in QUANTISATION if values.get(name)]
    if quantised:
        yield from _quantisation_problems(quantised, values, given, is_trained)
    elif is_trained and not _trains_adapter(values):
        yield from _unadapted_problems(values, given)


def _unadapted_problems(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The problem of a model that is quantised by ``model_init_kwargs``, or stands so in its folder."""
    usable = not any(settings_problems(given))  # those are reported elsewhere
    path = values.get("model_name_or_path")
    if usable and isinstance(path, str) and (method := quantised_as(path, given)):
        field = "model_init_kwargs" if "quantization_config" in given else "model_name_or_path"
        yield field, f"({method}) {NEEDS_ADAPTER} Set `use_peft: true`."


def _quantisation_problems(
    quantised: list[str], values: Mapping[str, Any], given: Mapping[str, Any], is_trained: bool
) -> Iterator[tuple[str, str]]:
    if len(quantised) == 2:
        yield quantised[0], "is given beside `load_in_8bit`. Give one of them."
    if "quantization_config" in given:
        yield quantised[0], "is given beside `quantization_config` in `model_init_kwargs`. Give one of them."
    if is_trained and not _trains_adapter(values):
        yield quantised[0], f"{NEEDS_ADAPTER} Set `use_peft: true`."
    if requirements.QLORA.missing:
        yield quantised[0], f"needs bitsandbytes. Install it with: {requirements.QLORA.install}"


def ignored_options(values: Mapping[str, Any]) -> list[str]:
    """The given fields that have no effect: options of 4-bit quantisation without it."""
    return [] if values.get("load_in_4bit") else [name for name in OF_4BIT if name in values]


def _computed_in(values: Mapping[str, Any]) -> str:
    """The type in which products with 4-bit weights are computed."""
    dtype = values.get("dtype")
    return values.get("bnb_4bit_compute_dtype") or (COMPUTED_IN if dtype in (None, "auto") else dtype)


def _trains_adapter(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_peft")) or _is_adapter(values.get("model_name_or_path"))


def _is_adapter(model: str | None) -> bool:
    return model is not None and (Path(os.path.expanduser(model)) / "adapter_config.json").is_file()
