"""Loading adapters of PEFT with their base models: every tensor of the folder is used, and none is left random."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from online_dpo.config.weight_files import tensors_in
from online_dpo.errors import ModelFolderError, error_text
from online_dpo.foreign import loading
from online_dpo.modeling.loaded import check_loaded_adapter


@contextmanager
def adapting() -> Iterator[None]:
    """Inside, deprecation warnings that PEFT causes are hidden: it uses names that transformers has renamed in 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_adapter(
    path: str, load_base: Callable[..., Any], task: str, *, is_trainable: bool = False, **options: Any
) -> Any:
    """Load an adapter and its base model. If its tokenizer has more tokens, the base model gets embeddings for them.

    Args:
        load_base: loads the base model, given its path and the options of ``from_pretrained``.
        task: ``CAUSAL_LM`` or ``SEQ_CLS``.

    Raises:
        ModelFolderError: no base model is named, or weights of the adapter are missing, left out or zero.
        RuntimeError: the adapter is for a model of another shape.
    """
    from peft import PeftConfig
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from peft.utils.constants import TOKENIZER_CONFIG_NAME

    revision = options.pop("revision", None)
    saved = _saved_names(path)
    config = PeftConfig.from_pretrained(path, revision=revision)
    base_path = config.base_model_name_or_path
    if not base_path:
        raise ModelFolderError(f"`{path}`: adapter_config.json names no base model. Set `base_model_name_or_path`.")
    if config.task_type not in (None, task):
        raise ModelFolderError(
            f"`{path}`: the adapter was trained for another task: its adapter_config.json says `task_type` "
            f"{str(config.task_type)!r}, and {task!r} is wanted."
        )
    with loading(base_path):
        base = load_base(base_path, revision=config.revision, **options)
    if (Path(path) / TOKENIZER_CONFIG_NAME).is_file():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=options.get("trust_remote_code", False))
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))
    with adapting(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].from_pretrained(
                base, path, is_trainable=is_trainable, config=config, revision=revision
            )
        except UserWarning as lacking:
            names = error_text(lacking).partition("checkpoint: ")[2]
            raise ModelFolderError(
                f"`{path}`: the adapter lacks weights that its adapter_config.json wants, which would be random: "
                f"{names[:400]} Copy or download it again."
            ) from None
    check_loaded_adapter(model, saved, path)
    return model


def _saved_names(path: str) -> set[str] | None:
    """The names of a folder's tensors; ``None`` if it is no folder, or they are in a pickle."""
    if not os.path.isdir(path):
        return None
    tensors = tensors_in(Path(path), "adapter_model", quantised=False)
    if tensors is None and not (Path(path) / "adapter_model.bin").is_file():
        raise ModelFolderError(f"`{path}` holds no weights of an adapter: there is no adapter_model.safetensors.")
    return None if tensors is None else set(tensors)
