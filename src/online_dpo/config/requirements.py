"""Packages that a setting needs beyond those that are installed with this one: one table, read before anything loads.

Nothing heavy is imported here, so that the command line can look as well.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from online_dpo.config.quantization import method_of, settings_of, settings_problems


@dataclass(frozen=True)
class Needs:
    """What has to be importable, and how it is installed. Of modules in one text, separated by ``|``, one is enough.

    >>> Needs("pip install tensorboard", "tensorboard|tensorboardX")
    """

    install: str
    modules: tuple[str, ...]

    def __init__(self, install: str, *modules: str) -> None:
        object.__setattr__(self, "install", install)
        object.__setattr__(self, "modules", modules)

    @property
    def missing(self) -> list[str]:
        """The modules that are not there; of alternatives, the first."""
        alternatives = [module.split("|") for module in self.modules]
        return [options[0] for options in alternatives if not any(map(installed, options))]


def pip(name: str, *modules: str) -> Needs:
    """A package by its name in the index; its module is called like it unless given."""
    return Needs(f"pip install {name}", *(modules or (name,)))


TRACKERS = {
    "azure_ml": pip("azureml-sdk", "azureml.core"),
    "clearml": pip("clearml"),
    "codecarbon": pip("codecarbon"),
    "comet_ml": pip("comet-ml", "comet_ml"),
    "dagshub": pip("dagshub mlflow", "dagshub", "mlflow"),
    "dvclive": pip("dvclive"),
    "flyte": pip("flytekit"),
    "kubeflow": Needs(""),  # reports to the job that the process runs in
    "mlflow": pip("'online-dpo[mlflow]'", "mlflow"),
    "neptune": pip("neptune"),
    "swanlab": pip("swanlab"),
    "tensorboard": pip("'online-dpo[tensorboard]'", "tensorboard|tensorboardX"),
    "trackio": pip("'online-dpo[trackio]'", "trackio"),
    "wandb": pip("'online-dpo[wandb]'", "wandb"),
}
"""Values of `report_to`, besides `all` and `none`."""

BITSANDBYTES, TORCHAO, SCHEDULEFREE = pip("bitsandbytes"), pip("torchao"), pip("schedulefree")
QLORA = pip("'online-dpo[qlora]'", "bitsandbytes")
GALORE, APOLLO = pip("galore-torch", "galore_torch"), pip("apollo-torch", "apollo_torch")
OPTIMIZERS = {
    "adafactor": None,
    "adagrad": None,
    "adalomo": None,  # refused, as all that update weights during the backward pass
    "adamw_8bit": BITSANDBYTES,
    "adamw_anyprecision": pip("git+https://github.com/pytorch/torchdistx", "torchdistx"),
    "adamw_bnb_8bit": BITSANDBYTES,
    "adamw_torch": None,
    "adamw_torch_4bit": TORCHAO,
    "adamw_torch_8bit": TORCHAO,
    "adamw_torch_fused": None,
    "adamw_torch_npu_fused": pip("torch-npu", "torch_npu"),
    "adamw_torch_xla": pip("torch-xla", "torch_xla"),
    "ademamix": BITSANDBYTES,
    "ademamix_8bit": BITSANDBYTES,
    "apollo_adamw": APOLLO,
    "apollo_adamw_layerwise": None,
    "galore_adafactor": GALORE,
    "galore_adafactor_layerwise": None,
    "galore_adamw": GALORE,
    "galore_adamw_8bit": GALORE,
    "galore_adamw_8bit_layerwise": None,
    "galore_adamw_layerwise": None,
    "grokadamw": pip("grokadamw"),
    "lion_32bit": BITSANDBYTES,
    "lion_8bit": BITSANDBYTES,
    "lomo": None,
    "paged_adamw_32bit": BITSANDBYTES,
    "paged_adamw_8bit": BITSANDBYTES,
    "paged_ademamix_32bit": BITSANDBYTES,
    "paged_ademamix_8bit": BITSANDBYTES,
    "paged_lion_32bit": BITSANDBYTES,
    "paged_lion_8bit": BITSANDBYTES,
    "rmsprop": None,
    "rmsprop_bnb": BITSANDBYTES,
    "rmsprop_bnb_32bit": BITSANDBYTES,
    "rmsprop_bnb_8bit": BITSANDBYTES,
    "schedule_free_adamw": SCHEDULEFREE,
    "schedule_free_radam": SCHEDULEFREE,
    "schedule_free_sgd": SCHEDULEFREE,
    "sgd": None,
    "stable_adamw": pip("torch-optimi", "optimi"),
}
"""Values of `optim`."""

COMPILERS = {
    "fx2trt": pip("torch-tensorrt", "torch_tensorrt"),
    "ipex": pip("intel-extension-for-pytorch", "intel_extension_for_pytorch"),
    "onnxrt": pip("onnxruntime"),
    "openxla": pip("torch-xla", "torch_xla"),
    "tensorrt": pip("torch-tensorrt", "torch_tensorrt"),
    "torchxla_trace_once": pip("torch-xla", "torch_xla"),
    "tvm": pip("apache-tvm", "tvm"),
}
"""Values of `torch_compile_backend` that torch does not bring with it."""

ATTENTION = {
    "flash_attention_2": pip("flash-attn", "flash_attn|kernels"),
    "flash_attention_3": pip("kernels", "flash_attn_interface|kernels"),
    "flash_attention_4": pip("kernels", "flash_attn.cute|kernels"),
}
"""Values of `attn_implementation`; those with a slash are kernels of the hub."""

QUANTIZATION = {
    "aqlm": pip("'aqlm[gpu,cpu]'", "aqlm"),
    "auto-round": pip("auto-round", "auto_round"),
    "awq": pip("gptqmodel"),
    "bitsandbytes": QLORA,
    "compressed-tensors": pip("compressed-tensors", "compressed_tensors"),
    "eetq": pip("kernels"),
    "gptq": pip("optimum gptqmodel", "optimum", "gptqmodel"),
    "hqq": pip("hqq"),
    "quanto": pip("optimum-quanto", "optimum.quanto"),
    "quark": pip("amd-quark", "quark"),
    "torchao": TORCHAO,
    "vptq": pip("vptq"),
}
"""Ways to quantise a model, by the ``quant_method`` of their configuration in `model_init_kwargs`."""

FLAGS = {
    "use_peft": pip("'online-dpo[peft]'", "peft"),
    "use_vllm": pip("'online-dpo[vllm]'", "vllm"),
}
"""Fields that are on or off."""

DEEPSPEED = "0.19"
"""The version whose private parts `distributed/deepspeed.py` uses."""
TORCH_OF_FSDP = "2.13"
"""The first with `FSDPModule.reset_iter_state`, without which a pass that ran out of memory cannot be undone."""
SHARDING = {
    "fsdp": Needs(""),
    "deepspeed": pip("'online-dpo[deepspeed]'", "deepspeed"),
}
"""Ways of sharding."""

PEFT = FLAGS["use_peft"]
RAY = pip("'online-dpo[ray]'", "ray")
KERNELS = pip("kernels")


def installed(module: str) -> bool:
    """Whether a module can be imported. A mere folder of that name, such as the ``wandb`` of earlier runs, is none."""
    parent = module.rpartition(".")[0]
    if parent and importlib.util.find_spec(parent.split(".")[0]) is None:
        return False
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the problems of these fields, each with its field's name: unknown names, and packages that are missing."""
    for name in as_list(values.get("report_to")):
        if name not in (None, "all", "none", ""):
            yield from _named("report_to", name, TRACKERS)
    if "kubeflow" in as_list(values.get("report_to")) and not os.environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
        yield (
            "report_to",
            "`report_to` 'kubeflow' works inside a Kubeflow TrainJob alone (KUBEFLOW_TRAINER_SERVER_URL).",
        )
    if isinstance(optim := values.get("optim"), str):
        yield from _named("optim", getattr(optim, "value", optim), OPTIMIZERS)
    yield from _of_backends(values)
    options = values.get("model_init_kwargs")
    if isinstance(options, Mapping):
        yield from _of_model(options)


def _of_backends(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The problems of the compiler, of adapters and of vLLM."""
    backend = values.get("torch_compile_backend")
    if isinstance(backend, str) and backend.lower() in COMPILERS:
        yield from _needed("torch_compile_backend", f" {backend!r}", COMPILERS[backend.lower()])
    for flag, needs in FLAGS.items():
        colocated = flag != "use_vllm" or values.get("vllm_mode", "colocate") == "colocate"
        if values.get(flag) and colocated:
            yield from _needed(flag, "", needs)
    if values.get("engine") == "vllm_colocate":
        yield from _needed("engine", " 'vllm_colocate'", FLAGS["use_vllm"])


def sharding_problem(kind: str) -> str | None:
    """What is missing to shard weights in this way: ``fsdp`` or ``deepspeed``; the message continues the field."""
    needs = SHARDING[kind]
    if needs.missing:
        return f"needs {' and '.join(needs.missing)}, not installed here. Install it with: {needs.install}"
    if kind == "deepspeed" and not (found := version("deepspeed")).startswith(f"{DEEPSPEED}."):
        return f"needs deepspeed {DEEPSPEED}, and {found} is installed. Install it with: {needs.install}"
    if kind == "fsdp" and Version(found := version("torch")) < Version(TORCH_OF_FSDP):
        return f"needs torch {TORCH_OF_FSDP} or later, and {found} is installed. `deepspeed` works with this one."
    return None


def adapter_problem(folder: str) -> str | None:
    """What is missing to load a model folder that holds an adapter."""
    if os.path.isfile(os.path.join(os.path.expanduser(folder), "adapter_config.json")) and PEFT.missing:
        return f"{folder} holds an adapter, which needs peft. Install it with: {PEFT.install}"
    return None


def as_list(value: Any) -> list[Any]:
    """A list as it is, one value as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _of_model(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    attention = options.get("attn_implementation")
    if isinstance(attention, str):
        needs = KERNELS if "/" in attention else ATTENTION.get(attention)
        if needs is not None:
            yield from _needed("model_init_kwargs", f" `attn_implementation` {attention!r}", needs)
    wrong = [*settings_problems(options)]
    yield from (("model_init_kwargs", f"`model_init_kwargs`: {problem}") for problem in wrong)
    method = "" if wrong else method_of(settings_of(options))
    if method in QUANTIZATION:
        yield from _needed("model_init_kwargs", f" `quantization_config` {method!r}", QUANTIZATION[method])


def _named(field: str, value: Any, table: Mapping[str, Needs | None]) -> Iterator[tuple[str, str]]:
    if value not in table:
        near = difflib.get_close_matches(str(value), table, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        yield field, f"`{field}` is {value!r}; wanted: one of {', '.join(table)}.{hint}"
    elif (needs := table[value]) is not None:
        yield from _needed(field, f" {value!r}", needs)


def _needed(field: str, value: str, needs: Needs) -> Iterator[tuple[str, str]]:
    if needs.missing:
        packages = " and ".join(module.split(".")[0] for module in needs.missing)
        yield field, f"`{field}`{value} needs {packages}, not installed here. Install it with: {needs.install}"
