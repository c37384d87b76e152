"""Loading policies and asking models what they take: the one place that knows about `transformers` and `peft`
classes.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from online_dpo.config.requirements import adapter_problem
from online_dpo.modeling.introspection import unwrapped

WRITTEN_BY_TRAINER = ("use_cache", "eos_token_id", "bos_token_id", "pad_token_id")
"""Fields of configs."""


def looks_local(path: str) -> bool:
    """Whether ``path`` can only be meant as a local folder, since no hub name has this form."""
    return path.startswith((os.sep, ".", "~")) or path.count("/") > 1


def check_model_path(path: str, argument: str) -> None:
    """Refuse a path that can only be a missing local folder, before anything is loaded.

    Raises:
        ValueError: ``path`` looks like a local folder (absolute, or starting with ``.`` or ``~``) and there is none, or
            a package is missing to load what it holds.
    """
    if looks_local(path) and not Path(path).expanduser().is_dir():
        raise ValueError(f"`{argument}`: there is no folder {path!r}. Give a saved model's folder or a hub name.")
    if problem := adapter_problem(path):
        raise ValueError(f"`{argument}`: {problem}")


def load_causal_lm(
    path: str,
    init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """A causal language model from a folder or the hub; an adapter folder gives its base model with the adapter
    trainable.

    Args:
        dtype: of the weights, unless ``init_kwargs`` name one; ``auto`` is the type that they were saved in.

    Raises:
        ValueError: ``init_kwargs["dtype"]`` names no torch type.
    """
    path = os.path.expanduser(path)
    kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    old_name = kwargs.pop("torch_dtype", None)  # transformers reads it only where `dtype` is not given
    given = kwargs.pop("dtype", old_name)
    kwargs["dtype"] = dtype if given is None else check_dtype(given)
    if is_adapter(path):
        from peft import AutoPeftModelForCausalLM

        with adapting():
            return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **kwargs)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


@contextmanager
def adapting() -> Iterator[None]:
    """Without warnings that only PEFT can heed: it asks transformers for attributes by the names of before 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def source_of(model: Any) -> str | None:
    """The folder or hub name that a model was loaded from: a name itself, what a model's config says, else ``None``."""
    if isinstance(model, str):
        return model
    base = unwrapped(model) if isinstance(model, nn.Module) else None
    return base.config._name_or_path or None if isinstance(base, PreTrainedModel) else None


def same_source(one: str, other: str) -> bool:
    """Whether two names mean the same model: the same hub name, or the same folder however it is written."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def is_adapter(path: str) -> bool:
    """Whether the folder holds an adapter of PEFT and not a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def check_dtype(given: Any) -> Any:
    """A type for `from_pretrained`; names of torch types become the types.

    Raises:
        ValueError: there is no type of this name.
    """
    if not isinstance(given, str) or given == "auto":
        return given
    if not isinstance(getattr(torch, given, None), torch.dtype):
        raise ValueError(f"`model_init_kwargs`: {given!r} is no torch dtype. Use 'auto', 'float32' or 'bfloat16'.")
    return getattr(torch, given)


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout to 0: of modules, and of numbers that modules hand to functions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, unless it is quantised or spread over devices, so that `transformers` has placed it."""
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return model if placed else model.to(device)


class ConfigKeeper(TrainerCallback):
    """Remembers what a model's configs say, and puts it back once `transformers.Trainer` has written into them.

    Trainer sets ``config.use_cache``, and when training begins it copies the tokenizer's special tokens into both
    configs; a saved model should say what its owner said.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def remember(self, model: nn.Module) -> None:
        base = unwrapped(model)
        holders = [vars(holder) for holder in (base.config, base.config.get_text_config(), base.generation_config)]
        self._kept = [(now, {name: now[name] for name in WRITTEN_BY_TRAINER if name in now}) for now in holders]

    def restore(self) -> None:
        """Once; from then on the configs are their owner's again."""
        for now, before in self._kept:
            for name in WRITTEN_BY_TRAINER:
                now.pop(name, None)
            now.update(before)
        self._kept = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.restore()


def empty_device_cache() -> None:
    """Give memory that the allocator holds but nobody uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
