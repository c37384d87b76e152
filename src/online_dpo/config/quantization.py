"""How a model is to be quantised as it is loaded: `quantization_config` among the arguments of ``from_pretrained``.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BITSANDBYTES = "bitsandbytes"
BITS = ("load_in_4bit", "load_in_8bit")
FIELDS = {
    "quant_method": (BITSANDBYTES,),
    **dict.fromkeys(BITS, (True, False)),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("float32", "bfloat16", "float16", None),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_quant_storage": ("uint8", "int8", "float16", "bfloat16", "float32", "float64", None),
    "llm_int8_threshold": (),
    "llm_int8_skip_modules": (),
    "llm_int8_enable_fp32_cpu_offload": (True, False),
    "llm_int8_has_fp16_weight": (True, False),
}
"""The fields of transformers' ``BitsAndBytesConfig``, and the values that they may have, if these can be listed."""
OF_TRL = {"use_bnb_nested_quant": "bnb_4bit_use_double_quant"}
"""Names of the same in run files, as in TRL."""
TRAINED_THROUGH_ADAPTERS = ("aqlm", "auto-round", "awq", BITSANDBYTES, "eetq", "gptq", "hqq", "quanto", "vptq")
"""Ways to quantise whose weights cannot be trained themselves."""
NEEDS_ADAPTER = "needs an adapter: quantised weights themselves cannot be trained."


def settings_of(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings in ``model_init_kwargs``, which may be a mapping or an object of transformers; empty without.

    >>> settings_of({"quantization_config": {"load_in_4bit": True}})
    {'load_in_4bit': True}
    """
    given = (options or {}).get("quantization_config")
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else dict(given.to_dict())


def method_of(settings: Mapping[str, Any]) -> str:
    """The way to quantise that settings name, ``""`` if none.

    >>> method_of({"load_in_4bit": True})
    'bitsandbytes'
    """
    in_bits = any(settings.get(name) for name in BITS)
    method = settings.get("quant_method", BITSANDBYTES if in_bits else "")
    return str(getattr(method, "value", method))


def settings_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Check the settings in ``model_init_kwargs``; yield problems, each a sentence that follows the field's name."""
    for name in BITS:
        if name in options:
            yield f"`{name}` belongs into `quantization_config`: write `quantization_config: {{{name}: true}}`."
    given = options.get("quantization_config")
    if given is None:
        return
    if not isinstance(given, Mapping):
        if isinstance(given, (str, bool, int, float, list)):  # else it is an object of transformers
            yield f"`quantization_config` is {given!r}; wanted: a mapping, such as `{{load_in_4bit: true}}`."
        return
    if method_of(given) == BITSANDBYTES:
        yield from _problems_in_bits(given)
    elif not method_of(given):
        yield "`quantization_config` says no `load_in_4bit: true`, `load_in_8bit: true` or `quant_method`."


def _problems_in_bits(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        known = FIELDS.get(name.removeprefix("_"))  # saved configs have `_load_in_4bit` beside `load_in_4bit`
        if known is None:
            near = OF_TRL.get(name) or next(iter(difflib.get_close_matches(name, FIELDS, n=1)), None)
            hint = f" Did you mean `{near}`?" if near else ""
            yield f"`quantization_config` has no `{name}`.{hint}"
        elif known and _plain(value) not in known:
            values = ", ".join(json.dumps(one) for one in known if one is not None)
            yield f"`quantization_config`: `{name}` is {json.dumps(value, default=str)}; wanted: one of {values}."
    if all(given.get(name) for name in BITS):
        yield "`quantization_config` says both `load_in_4bit` and `load_in_8bit`. Give one of them."
    elif not any(given.get(name) for name in BITS):
        yield "`quantization_config` says neither `load_in_4bit: true` nor `load_in_8bit: true`."


def _plain(value: Any) -> Any:
    """A value as it stands in a file: types of torch by their names, members of enumerations by their values."""
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, str)) or value is None else str(value).removeprefix("torch.")


def quantised_as(path: str, options: Mapping[str, Any] | None) -> str | None:
    """The way in which a model will be quantised, so that it can be trained through an adapter alone; ``None`` if its
    own weights can be trained. A folder's own config counts as well; one of the hub is not looked up.
    """
    settings = settings_of_model(path, options)
    method = method_of(settings)
    return method if method in TRAINED_THROUGH_ADAPTERS and not settings.get("dequantize") else None


def _settings_of_folder(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}  # whoever loads it says what is wrong with it
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}


def settings_of_model(path: str, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The settings with which a model will be loaded: those given, or else those of its own folder."""
    return settings_of(options) or _settings_of_folder(Path(os.path.expanduser(path)))


def check_sharded(settings: Mapping[str, Any], args: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that the way in which a run shards its policy leaves packed weights as they are.

    Args:
        settings: how the policy is quantised; empty if it is not.
        args: the configuration of the run.

    Raises:
        ValueError: scales would be lost, or packed weights that are stored as floats would be rounded like numbers.
    """
    fsdp = bool(args.fsdp) or environment.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on", "y", "t")
    sharding = "FSDP2" if fsdp else "DeepSpeed" if args.deepspeed_plugin is not None else None
    if sharding is None or method_of(settings) != BITSANDBYTES:
        return
    if fsdp and settings.get("load_in_8bit"):
        raise ValueError(
            "`load_in_8bit` does not go with FSDP2: its slices of weights lose their scales. Use `load_in_4bit: true`, "
            "start the run without FSDP, or use DeepSpeed (`deepspeed`)."
        )
    storage = _plain(settings.get("bnb_4bit_quant_storage"))
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if settings.get("load_in_4bit") and "float" in str(storage) and computed not in (None, storage):
        raise ValueError(
            f"`bnb_4bit_quant_storage` is {storage}, and {sharding} would round the packed weights to {computed}, as "
            f"it does with the other weights of this run. Set it to {computed}, or to uint8."
        )
