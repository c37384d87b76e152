"""How a run shards its policy: what its fields, or accelerate's launcher, ask for, checked and put into one form.

Everything is known before a model is loaded. Nothing heavy is imported here, so that the command line checks it too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from online_dpo.config import deepspeed_options, fsdp_options, launcher
from online_dpo.config.json_text import parse_json
from online_dpo.config.requirements import sharding_problem
from online_dpo.distributed.processes import started_together

ENVIRONMENT = "accelerate's launcher"
OPTIMIZERS = {
    "fsdp": ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"),
    "deepspeed": ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"),
}
"""Values of `optim` that give sharded weights the updates of whole ones: by the numbers of one weight alone."""
SPLIT = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
"""Options of `from_pretrained` that split a model in ways of transformers' own."""


class ShardingError(ValueError):
    """A setting of sharding that is wrong; ``field`` is the field that said it, ``None`` if it was the launcher."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Asked:
    """The way of sharding that a run asks for, with checked options in the form that transformers reads.

    >>> Asked("fsdp", {"version": 2})
    """

    kind: Literal["fsdp", "deepspeed"]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """What a message calls it, such as ``ZeRO-3``."""
        return "FSDP2" if self.kind == "fsdp" else f"ZeRO-{self.options['zero_optimization']['stage']}"


def asked_sharding(
    values: Mapping[str, Any], environment: Mapping[str, str] | None = None, processes: int | None = None
) -> Asked | None:
    """Returns the way of sharding that fields and the environment of a process ask for, or nothing.

    Args:
        values: fields of the run; those that are missing have their defaults.
        processes: the number of those that will train, where this process is not one of them.

    Raises:
        ShardingError: something is wrong; the message says what to do.
    """
    environment = os.environ if environment is None else environment
    if problem := launcher.refused(environment):
        raise ShardingError(None, problem)
    _check_split(values)
    fsdp, deepspeed = _fsdp(values, environment), _deepspeed(values, environment)
    if fsdp is not None and deepspeed is not None:
        field, other = ("fsdp", "deepspeed") if values.get("fsdp") else ("deepspeed", "fsdp")
        beside = "" if values.get(other) else f" ({other} from {ENVIRONMENT})"
        raise ShardingError(field, f"`fsdp` and `deepspeed` are given together{beside}. Give one of them.")
    asked = fsdp or deepspeed
    if asked is not None:
        _check_run(asked, values, environment, processes)
    return asked


def _check_split(values: Mapping[str, Any]) -> None:
    if values.get("ds3_gather_for_generation") is False:
        raise ShardingError(
            "ds3_gather_for_generation",
            "`ds3_gather_for_generation: false` would gather weights for every token, and ranks that finish at "
            "different lengths would wait for each other for ever. Leave it out.",
        )
    options = values.get("model_init_kwargs")
    for name in SPLIT:
        if isinstance(options, Mapping) and options.get(name) is not None:
            raise ShardingError(
                "model_init_kwargs",
                f"`model_init_kwargs`: `{name}` splits a model in a way that is not supported. Use `fsdp: true` or "
                "`deepspeed`.",
            )


def _fsdp(values: Mapping[str, Any], environment: Mapping[str, str]) -> Asked | None:
    given, from_launcher = values.get("fsdp"), launcher.fsdp_options(environment)
    asked = given not in (None, False, "", [], "false", "False")
    if not asked and from_launcher is None:
        if values.get("fsdp_config"):
            raise ShardingError("fsdp_config", "`fsdp_config` has no effect without `fsdp: true`. Give both.")
        return None
    checkpointing = values.get("gradient_checkpointing") is not False
    try:
        own = read_options("fsdp_config", values.get("fsdp_config") or {})
        own = {**(fsdp_options.from_words(given) if asked else {}), **own}
        if from_launcher is not None and not own:
            options = fsdp_options.settled(from_launcher, ENVIRONMENT, checkpointing=checkpointing)
        else:
            options = fsdp_options.settled(own, "`fsdp_config`", checkpointing=checkpointing)
    except ValueError as error:
        field = None if from_launcher is not None and not asked else "fsdp"
        field = "fsdp_config" if field and values.get("fsdp_config") and "`fsdp_config`" in str(error) else field
        raise ShardingError(field, str(error)) from error
    return Asked("fsdp", options)


def _deepspeed(values: Mapping[str, Any], environment: Mapping[str, str]) -> Asked | None:
    given = values.get("deepspeed")
    try:
        from_launcher = launcher.deepspeed_options(environment)
    except ValueError as error:
        raise ShardingError(None, str(error)) from error
    found = [(None, from_launcher)] if from_launcher is not None else []
    found += [("deepspeed", given)] if given is not None else []
    settled = []
    for field, options in found:
        source = "`deepspeed`" if field else ENVIRONMENT
        try:
            settled.append(deepspeed_options.settled(read_options("deepspeed", options), source, _run(values)))
        except ValueError as error:
            raise ShardingError(field, str(error)) from error
    if len(settled) > 1 and settled[0] != settled[1]:
        raise ShardingError(
            "deepspeed", f"`deepspeed` and {ENVIRONMENT} give different configurations. Leave one of them out."
        )
    return Asked("deepspeed", settled[0]) if settled else None


def _run(values: Mapping[str, Any]) -> deepspeed_options.RunValues:
    started, use_cpu = started_together(), bool(values.get("use_cpu"))
    bf16 = values.get("bf16")
    norm = values.get("max_grad_norm")
    return deepspeed_options.RunValues(
        batch=values.get("per_device_train_batch_size") or 8,
        accumulation=values.get("gradient_accumulation_steps") or 1,
        processes=1 if started is None else started.count,
        max_grad_norm=1.0 if norm is None else norm,
        bf16=bf16 if bf16 is not None or not use_cpu else False,
        fp16=bool(values.get("fp16")),
        use_cpu=use_cpu,
    )


def read_options(name: str, given: Any) -> dict[str, Any]:
    """Returns options from a mapping, JSON text or the path of a JSON file.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise ValueError(f"`{name}` is {given!r}; wanted: a mapping, or the path of a JSON file.")
    text = given
    if not given.lstrip().startswith("{"):
        path = Path(os.path.expanduser(given))
        if not path.is_file():
            raise ValueError(f"`{name}` is {given!r}, but there is no such file. Give a JSON file, or a mapping.")
        text = path.read_text(encoding="utf-8")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"`{name}`: {given} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}`: {given} holds no JSON object.")
    return value


def _check_run(asked: Asked, values: Mapping[str, Any], environment: Mapping[str, str], processes: int | None) -> None:
    """Check what else a run wants against the way that it is sharded."""
    kind = asked.kind
    together = started_together() is not None if processes is None else processes > 1
    if problem := sharding_problem(kind):
        raise ShardingError(kind, f"`{kind}` {problem}")
    if kind == "fsdp" and not together:
        raise ShardingError(
            kind,
            "`fsdp` shards weights over several processes, and this is the only one. Start them with `torchrun "
            "--nproc_per_node N -m online_dpo train ...`, or leave `fsdp` out.",
        )
    if kind == "deepspeed" and "RANK" not in environment and not together and processes is None:
        raise ShardingError(
            kind,
            "`deepspeed` needs a launcher, also for one process: `torchrun --nproc_per_node N -m online_dpo train ...`",
        )
    if values.get("fp16"):
        raise ShardingError("fp16", "`fp16` is not supported where weights are sharded. Use `bf16`.")
    optim = values.get("optim", OPTIMIZERS[kind][0])
    optim = getattr(optim, "value", optim)
    if optim not in OPTIMIZERS[kind]:
        raise ShardingError(
            "optim",
            f"`optim={optim!r}` computes with whole tensors, or was not compared with one process under {asked.name}. "
            f"Use one of {', '.join(OPTIMIZERS[kind])}.",
        )
    if values.get("torch_compile"):
        raise ShardingError("torch_compile", f"`torch_compile` is not supported with {asked.name}. Leave it off.")


def settle_sharding(args: Any) -> None:
    """Puts what a configuration and its launcher ask for into its fields, as transformers reads them.

    Raises:
        ShardingError: something is wrong; the message says what to do.
    """
    asked = asked_sharding(vars(args))
    if asked is not None and asked.kind == "fsdp":
        args.fsdp, args.fsdp_config = True, asked.options
    elif asked is not None:
        args.deepspeed = asked.options


def settle_precision(bf16: bool | None, fp16: bool, environment: Mapping[str, str] | None = None) -> bool | None:
    """Returns `bf16` as the run and accelerate's launcher say it.

    Raises:
        ValueError: they contradict each other.
    """
    said = launcher.mixed_precision(os.environ if environment is None else environment)
    if said is None or (said == "fp16" and fp16) or (said == "bf16" and bf16):
        return bf16
    if said == "bf16" and bf16 is None and not fp16:
        return True
    remedy = f"`{said}: true`" if said in ("bf16", "fp16") else "`bf16: true`, since that type is not supported,"
    raise ValueError(
        f"{ENVIRONMENT} says `mixed_precision: {said}`, and the run does not. Write {remedy} in the run's "
        "configuration, or `mixed_precision: 'no'` in the launcher's file."
    )
