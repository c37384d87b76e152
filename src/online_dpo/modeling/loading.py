"""Loading causal language models and adapters, and preparing them: dropout, device, saved configs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from online_dpo.config.model_folder import Role, folder_problem
from online_dpo.config.requirements import adapter_problem
from online_dpo.errors import ModelFolderError
from online_dpo.modeling.adapters import load_adapter
from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.loaded import check_config, check_loaded, without_report

WRITTEN_BY_TRAINER = ("use_cache", "eos_token_id", "bos_token_id", "pad_token_id")
"""Fields of a model's configs that `transformers.Trainer` overwrites."""

CAUSAL_WHATEVER_THEY_SAY = ("gpt_neox", "gpt_neox_japanese")
"""Families of causal models alone whose configs say `is_decoder: false`, as those of encoders do. Pythia is one."""


def looks_local(path: str) -> bool:
    """Whether ``path`` can only be a local folder, because no hub name has this form."""
    return path.startswith((os.sep, ".", "~")) or path.count("/") > 1


def check_model_path(path: str, argument: str, role: Role = "policy", options: Mapping[str, Any] | None = None) -> None:
    """Refuses, before anything is loaded, a local folder that does not exist or cannot be this model.

    Args:
        argument: the one that the path was given as.
        options: further arguments of ``from_pretrained``.

    Raises:
        ValueError: ``path`` looks like a local folder (absolute, or starting with ``.`` or ``~``) that does not exist,
            the folder is damaged or holds another kind of model (see `config.model_folder`), or a package is missing
            that is needed to load it.
    """
    if looks_local(path) and not Path(path).expanduser().is_dir():
        raise ValueError(f"`{argument}`: there is no folder {path!r}. Give a saved model's folder or a hub name.")
    if problem := adapter_problem(path) or folder_problem(path, role, options):
        raise ValueError(f"`{argument}`: {problem}")


def load_causal_lm(
    path: str,
    init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """Loads a causal language model from a folder or the hub. A folder with an adapter gives the base model with that
    adapter, trainable.

    Args:
        dtype: the dtype of the weights, unless ``init_kwargs`` has one; ``auto`` is the dtype they were saved in.

    Raises:
        ValueError: ``init_kwargs["dtype"]`` is not the name of a torch dtype, or weights are missing, of another shape
            or left out.
    """
    path = os.path.expanduser(path)
    kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if kwargs.get("weights_only", True) is not True:
        raise ValueError("`model_init_kwargs`: `weights_only` stays on: without it a pickle's code would be run.")
    old_name = kwargs.pop("torch_dtype", None)  # transformers reads it only if `dtype` is not given
    requested = kwargs.pop("dtype", old_name)
    kwargs["dtype"] = dtype if requested is None else check_dtype(requested)
    if is_adapter(path):
        return load_adapter(path, _load_whole, "CAUSAL_LM", is_trainable=True, **kwargs)
    return _load_whole(path, **kwargs)


def _load_whole(path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a model that is no adapter, and checks that all its weights are those of its folder."""
    named = {name: kwargs[name] for name in ("revision", "trust_remote_code", "subfolder", "token") if name in kwargs}
    config = AutoConfig.from_pretrained(path, **named)
    check_config(config, path)
    if vars(config).get("is_decoder") is False and config.model_type not in CAUSAL_WHATEVER_THEY_SAY:
        raise ModelFolderError(
            f"`{path}` is an encoder: each token of its texts reads those after it, so it cannot predict the next one. "
            "Give a causal language model."
        )
    with without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    model, info = loaded
    check_loaded(model, info, path, "causal language model")
    return model


def source_of(model: Any) -> str | None:
    """The folder or hub name that a model was loaded from: ``model`` itself if it is text, else the name in its config;
    ``None`` if there is none.
    """
    if isinstance(model, str):
        return model
    base = unwrapped(model) if isinstance(model, nn.Module) else None
    return base.config._name_or_path or None if isinstance(base, PreTrainedModel) else None


def same_source(one: str, other: str) -> bool:
    """Whether two names mean the same model: equal names, or two spellings of the path of one folder."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def is_adapter(path: str) -> bool:
    """Whether the folder holds a PEFT adapter instead of a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def check_dtype(given: Any) -> Any:
    """The ``dtype`` argument of `from_pretrained`: the name of a torch dtype becomes that dtype.

    Raises:
        ValueError: there is no dtype with this name.
    """
    if not isinstance(given, str) or given == "auto":
        return given
    dtype = getattr(torch, given, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`model_init_kwargs`: {given!r} is not a torch dtype. Use 'auto', 'float32' or 'bfloat16'.")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"`model_init_kwargs`: no model computes in the dtype {given!r}. Use 'float32' or 'bfloat16'.")
    return getattr(torch, given)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of dropout modules, and of attributes that modules pass to functions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves the model to the device, unless `transformers` has placed it: if it is quantised or split over devices."""
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return model if placed else model.to(device)


class ConfigKeeper(TrainerCallback):
    """Restores the fields of a model's configs that `transformers.Trainer` overwrites.

    Trainer sets ``config.use_cache``, and at the start of training it copies the tokenizer's special tokens into both
    configs. A saved model should have the user's values.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def remember(self, model: nn.Module) -> None:
        """Stores the present values of the model's configs."""
        base = unwrapped(model)
        configs = [vars(config) for config in (base.config, base.config.get_text_config(), base.generation_config)]
        self._kept = [(now, {name: now[name] for name in WRITTEN_BY_TRAINER if name in now}) for now in configs]

    def restore(self) -> None:
        """Restores the stored values, once: later changes to the configs are the user's and stay."""
        for now, before in self._kept:
            for name in WRITTEN_BY_TRAINER:
                now.pop(name, None)
            now.update(before)
        self._kept = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restores the configs: Trainer has written into them by now."""
        self.restore()


def forget_tied_names(model: nn.Module, missing: list[str]) -> None:
    """Removes from the names of weights that a file lacks those under which it has no weight of its own: a weight with
    several names (a tied ``lm_head``) is saved under one of them.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
    for name in [name for name in missing if name in named and id(named[name]) in loaded]:
        missing.remove(name)
