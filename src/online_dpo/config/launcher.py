"""What accelerate's launcher says of a run, by the environment variables that it sets for each process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported. Use `distributed_type: FSDP` or `DEEPSPEED`",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and hybrid parallelism (`parallelism_config`) are not "
    "supported. Leave it out",
    "FSDP_IGNORED_MODULES": "`fsdp_ignored_modules` would leave weights out of training's checks. Leave it out",
}
"""Variables that ask for what this version does not do."""
FSDP_VARIABLES = {
    "version": "FSDP_VERSION",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "min_num_params": "FSDP_MIN_NUM_PARAMS",
    "state_dict_type": "FSDP_STATE_DICT_TYPE",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "activation_checkpointing_offload": "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
}
"""Keys of `fsdp_config` and the variables that say the same."""


IN_FILE = ("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device")
IN_FILE += ("offload_param_device", "zero3_save_16bit_model", "mixed_precision")
"""Fields of accelerate's that have no effect beside a file of DeepSpeed."""


def says(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a variable is set, and not to a word for no."""
    return environment.get(variable, "").lower() not in ("", "0", "n", "no", "f", "false", "off", "none")


def refused(environment: Mapping[str, str]) -> str | None:
    """Returns the error message if the launcher asks for what this version does not do."""
    for variable, message in REFUSED.items():
        if says(environment, variable):
            return f"accelerate's launcher ({variable}): {message}."
    return None


def fsdp_options(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns `fsdp_config` as the launcher says it; ``None`` if it does not ask for FSDP.

    >>> fsdp_options({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"})
    {'version': '2', 'cpu_offload': 'false'}
    """
    if not says(environment, "ACCELERATE_USE_FSDP"):
        return None
    options: dict[str, Any] = {"version": "1"}  # what accelerate assumes
    for key, variable in FSDP_VARIABLES.items():
        if (value := environment.get(variable)) not in (None, "", "None"):
            options[key] = value
    if options.get("auto_wrap_policy") == "NO_WRAP":  # what accelerate assumes; whole models would be gathered at once
        del options["auto_wrap_policy"]
    if "transformer_layer_cls_to_wrap" in options:
        options["transformer_layer_cls_to_wrap"] = options["transformer_layer_cls_to_wrap"].split(",")
    return options


def deepspeed_options(environment: Mapping[str, str]) -> dict[str, Any] | str | None:
    """Returns DeepSpeed's configuration, or the path of its file, as the launcher says it; ``None`` if it does not ask
    for DeepSpeed.
    """
    if not says(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    if says(environment, "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        said = environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
        if beside := [name for name in IN_FILE if name in said]:
            raise ValueError(
                f"accelerate's launcher has a `deepspeed_config_file` and `{beside[0]}` beside it, which DeepSpeed "
                "would not read. Write it into that file."
            )
        return environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    zero: dict[str, Any] = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for key in ("offload_optimizer", "offload_param"):
        prefix = f"ACCELERATE_DEEPSPEED_{key.upper()}"
        if says(environment, f"{prefix}_DEVICE"):
            zero[key] = {"device": environment[f"{prefix}_DEVICE"]}
    if says(environment, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    options: dict[str, Any] = {"zero_optimization": zero}
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    options["gradient_clipping"] = clipping if clipping == "auto" else float(clipping)
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.isdigit() and steps != "1":  # 1 is what accelerate writes into every file
        options["gradient_accumulation_steps"] = int(steps)
    return options


def mixed_precision(environment: Mapping[str, str]) -> str | None:
    """Returns the type that the launcher asks to compute in: ``bf16``, ``fp16`` or ``fp8``; ``None`` if in none."""
    said = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if said in ("no", "") else said
