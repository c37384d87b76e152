"""Options of FSDP2: those that a run may have, and those that are refused, each with what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "")
SWITCHES = ("cpu_offload", "reshard_after_forward", "activation_checkpointing", "cpu_ram_efficient_loading")
TAKEN = (*SWITCHES, "version", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params", "state_dict_type")
OTHER_NAMES = {"offload_params": "cpu_offload", "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap"}
"""Names that accelerate has for them."""
OF_FSDP1 = ("sharding_strategy", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states")
OF_FSDP1 += ("limit_all_gathers",)
REFUSED = {
    **dict.fromkeys(OF_FSDP1, "is an option of FSDP1. Leave it out"),
    **dict.fromkeys(("xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt"), "is for TPUs. Leave it out"),
    "activation_checkpointing_offload": "is not supported. Leave it out, or use `cpu_offload: true`",
    "ignored_modules": "would leave weights out of sharding. Leave it out",
}
WORDS = {"full_shard": True, "shard_grad_op": False}
"""Words of `fsdp`, and whether weights are freed after a forward pass."""
CHOICES = {
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
}
VERSION = "`fsdp_config: {version: 2}`, or `fsdp_version: 2` under `fsdp_config` in a file of accelerate"


def from_words(words: Any) -> dict[str, Any]:
    """Returns the options that the older form of `fsdp` means.

    >>> from_words("full_shard auto_wrap")
    {'reshard_after_forward': True}

    Raises:
        ValueError: a word is unknown, or means something that FSDP2 does not have here.
    """
    options: dict[str, Any] = {}
    if words is True or str(words).lower() == "true":
        return options
    for word in str(words).split() if isinstance(words, str) else map(str, words):
        if word in WORDS:
            options["reshard_after_forward"] = WORDS[word]
        elif word == "offload":
            options["cpu_offload"] = True
        elif word in ("hybrid_shard", "hybrid_shard_zero2"):
            raise ValueError(f"`fsdp: {word}` is not supported: weights are sharded over all processes. Write `true`.")
        elif word == "no_shard":
            raise ValueError("`fsdp: no_shard` shards nothing. Leave `fsdp` out: several processes work without it.")
        elif word != "auto_wrap":
            raise ValueError(f"`fsdp` is {words!r}; wanted: `true`, with options in `fsdp_config`.")
    return options


def settled(options: Mapping[str, Any], source: str, *, checkpointing: bool) -> dict[str, Any]:
    """Returns checked options in the form that transformers reads.

    Args:
        source: names the options in messages.
        checkpointing: the run's `gradient_checkpointing`.

    Raises:
        ValueError: an option is unknown, has a wrong value, or is refused.
    """
    given = {_name(key): value for key, value in options.items()}
    for key, value in given.items():
        _check_known(key, value, source)
    result = {key: _switch(key, value, source) if key in SWITCHES else value for key, value in given.items()}
    if str(given.get("version", 2)) != "2":
        raise ValueError(f"{source} asks for FSDP1, which is not supported. Write {VERSION}.")
    for key, choices in CHOICES.items():
        if key in result and str(result[key]).upper() not in choices:
            raise ValueError(f"{source}: `{key}` is {result[key]!r}; wanted: one of {', '.join(choices)}.")
        if key in result:
            result[key] = str(result[key]).upper()
    if result.pop("activation_checkpointing", False) and not checkpointing:
        raise ValueError(
            f"{source} asks for `activation_checkpointing`, and `gradient_checkpointing` is off; both mean the same. "
            "Leave one of them out."
        )
    if "min_num_params" in result:
        result["min_num_params"] = _count(result["min_num_params"], source)
    return {
        **{key: value for key, value in result.items() if key in TAKEN},
        "version": 2,
        "activation_checkpointing": False,  # `gradient_checkpointing` does it
        "cpu_ram_efficient_loading": False,  # all ranks load whole models: reward models would be wrong
    }


def _name(key: str) -> str:
    key = str(key).removeprefix("fsdp_")
    return OTHER_NAMES.get(key, key)


def _check_known(key: str, value: Any, source: str) -> None:
    if key in REFUSED:
        if str(value).lower() not in FALSE_WORDS and value != {}:
            raise ValueError(f"{source}: `{key}` {REFUSED[key]}.")
    elif key not in TAKEN:
        near = difflib.get_close_matches(key, TAKEN, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else f" Options: {', '.join(TAKEN)}."
        raise ValueError(f"{source}: there is no option `{key}`.{hint}")


def _switch(key: str, value: Any, source: str) -> bool:
    word = str(value).lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"{source}: `{key}` is {value!r}; wanted: true or false.")
    return word in TRUE_WORDS


def _count(value: Any, source: str) -> int:
    if not str(value).isdecimal():
        raise ValueError(f"{source}: `min_num_params` is {value!r}; wanted: a whole number.")
    return int(value)
