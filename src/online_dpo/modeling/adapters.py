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
from online_dpo.errors import error_text
from online_dpo.modeling.loaded import check_loaded_adapter


@contextmanager
def adapting() -> Iterator[None]:
    """Inside, deprecation warnings that PEFT causes are hidden: it uses names that transformers has renamed in 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_adapter(
    path: str, load_base: Callable[..., Any], peft_class: Any, *, is_trainable: bool = False, **options: Any
) -> Any:
    """Load an adapter and its base model. If its tokenizer has more tokens, the base model gets embeddings for them.

    Args:
        load_base: loads the base model, given its path and the options of ``from_pretrained``.
        peft_class: such as `peft.PeftModelForCausalLM`.

    Raises:
        ValueError: the base model is not there, or the adapter does not fit it.
    """
    from peft import PeftConfig
    from peft.utils.constants import TOKENIZER_CONFIG_NAME

    revision = options.pop("revision", None)
    config = PeftConfig.from_pretrained(path, revision=revision)
    base_path = config.base_model_name_or_path
    if not base_path:
        raise ValueError(f"`{path}`: adapter_config.json names no base model. Set `base_model_name_or_path`.")
    base = load_base(base_path, revision=config.revision, **options)
    if (Path(path) / TOKENIZER_CONFIG_NAME).is_file():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=options.get("trust_remote_code", False))
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))
    with adapting(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            model = peft_class.from_pretrained(base, path, is_trainable=is_trainable, config=config, revision=revision)
        except UserWarning as lacking:
            names = error_text(lacking).partition("checkpoint: ")[2]
            raise ValueError(
                f"`{path}`: the adapter lacks weights that its adapter_config.json wants, which would be random: "
                f"{names[:400]} Copy or download it again."
            ) from None
        except RuntimeError as error:
            raise ValueError(f"`{path}` does not fit its base model {base_path}: {error_text(error)}") from error
    saved = tensors_in(Path(path), "adapter_model", "adapter_model", quantised=False) if os.path.isdir(path) else None
    check_loaded_adapter(model, saved, path)
    return model
