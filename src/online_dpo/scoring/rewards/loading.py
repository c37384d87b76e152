"""Loading reward models and their tokenizers from folders or the hub, and checking that they are reward models."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from online_dpo.distributed.loading import loading_whole
from online_dpo.errors import ModelFolderError, error_text
from online_dpo.foreign import loading
from online_dpo.modeling.adapters import load_adapter
from online_dpo.modeling.loaded import check_config, check_finite, check_loaded, check_not_zero, without_report


def load_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a reward model and its tokenizer from a folder or the hub. A PEFT adapter is loaded with its base model.

    ``dtype="auto"`` keeps the type that the weights were saved in. The tokenizer of an adapter is the one saved with
    it, else the base model's.

    Raises:
        ValueError: the model's head has more than one label, the head was not trained, or there is no tokenizer.
    """
    path = os.path.expanduser(path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading(path):
        adapter_config = find_adapter_config_file(path, revision=revision)
    if adapter_config is not None:
        model, base_path, base_revision = _load_adapter(path, dtype=dtype, **options)
        if tokenizer is None and not has_file(path, "tokenizer_config.json", revision=revision):
            tokenizer = load_tokenizer(base_path, revision=base_revision, trust_remote_code=trust_remote_code)
    else:
        model = _load_model(path, dtype=dtype, **options)
    return model, tokenizer or load_tokenizer(path, **options)


def check_reward_model(model: nn.Module) -> PreTrainedConfig:
    """Check that a model can be a reward model, and return its config.

    Raises:
        TypeError: the model has no config.
        ValueError: its head has more than one label.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"A reward model must be a model of transformers or PEFT; {type(model).__name__} has no `config`. Wrap it "
            "in a reward function instead."
        )
    if config.num_labels != 1:
        raise ValueError(not_one_label(last_part(config._name_or_path) or type(model).__name__, config.num_labels))
    return config


def last_part(path: str) -> str:
    """The last part of a path or hub name: ``model`` for ``org/model`` and for ``/some/folder/model/``."""
    return path.rstrip("/").split("/")[-1]


def _load_model(path: str, **options: Any) -> nn.Module:
    # Accept mismatched sizes here, to raise an error below that says what to do.
    with loading(path), loading_whole(), without_report():
        named = {name: options[name] for name in ("revision", "trust_remote_code")}
        config = AutoConfig.from_pretrained(path, **named)
        check_config(config, path)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for name, saved, wanted in info["mismatched_keys"]:
        if tuple(wanted)[:1] == (1,) and tuple(saved)[1:] == tuple(wanted)[1:]:
            raise ValueError(not_one_label(path, f"`{name}` of shape {tuple(saved)}"))
    check_loaded(model, info, path, "reward model")
    check_not_zero(model, path)
    check_finite(model, path)
    return model


def _load_adapter(path: str, **options: Any) -> tuple[nn.Module, str, str | None]:
    from peft import PeftConfig

    with loading(path):
        peft_config = PeftConfig.from_pretrained(path, revision=options["revision"])
    if peft_config.task_type != "SEQ_CLS":
        raise ValueError(
            f"`{path}` is no reward model: its adapter_config.json says `task_type` {peft_config.task_type!r}, and the "
            "head that scores a text would be random. Give an adapter that was trained with SEQ_CLS."
        )
    try:
        with loading_whole():
            model = load_adapter(path, _load_base, "SEQ_CLS", **options)
    except RuntimeError as error:  # what torch and transformers raise if shapes differ
        raise ValueError(
            f"{not_one_label(path, 'other shapes')} Loading it failed with: {error_text(error)}"
        ) from error
    check_finite(model, path)
    base_path = peft_config.base_model_name_or_path
    assert base_path is not None, "an adapter without a base model was refused above"
    return model, base_path, peft_config.revision


def _load_base(path: str, **options: Any) -> nn.Module:
    """The base model of an adapter; the head that it lacks comes with the adapter."""
    with loading(path), without_report():
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)


def load_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a reward model.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        with loading(path):
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except ModelFolderError as error:
        if os.path.isfile(os.path.join(path, "tokenizer.json")):
            raise
        raise ModelFolderError(f"{no_tokenizer(path)} Loading one failed with: {error_text(error)}") from error
    # For some model types, transformers creates an empty tokenizer if there are no tokenizer files.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(no_tokenizer(path))
    return tokenizer


def no_tokenizer(name: str) -> str:
    """The beginning of the message for a reward model without a tokenizer."""
    return f"Reward model `{name}` comes without a tokenizer. Pass its tokenizer in `reward_processing_classes`."


def not_one_label(name: str, actual: Any) -> str:
    """The message for a head of another size."""
    return f"Reward model `{name}` must have a head with one label (num_labels=1); it has {actual}."
