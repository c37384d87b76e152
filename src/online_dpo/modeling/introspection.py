"""What a model is and takes: its arguments, its types, its length, what it ends with."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model under the wrappers of data parallelism, `torch.compile` and PEFT."""
    wrapped: Any = model
    if "_orig_mod" not in vars(model):  # accelerate takes milliseconds to see these two, in each forward pass
        if isinstance(model, PreTrainedModel):
            return model
        peft = sys.modules.get("peft")  # not imported: this is none of its models
        if peft is not None and isinstance(model, peft.PeftModel):
            return wrapped.get_base_model()
    wrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    return wrapped.get_base_model() if is_peft_model(wrapped) else wrapped


def accepts_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's own ``forward`` names this argument (``**kwargs`` does not count)."""
    return name in inspect.signature(type(unwrapped(model)).forward).parameters


def logits_alone(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep a mixture of experts, whatever its config says, from computing the loss that balances them.
    It is not added to ours, and it can neither read masks of more than two dimensions nor decode token by token.
    """
    return {"output_router_logits": False} if accepts_argument(model, "output_router_logits") else {}


def hands_on_arguments(model: nn.Module) -> bool:
    """Whether this is a model of `transformers` that calls its attention function in every layer, with whatever further
    arguments it is given, and keeps no state but keys and values.
    """
    base: Any = unwrapped(model)
    return isinstance(base, PreTrainedModel) and base._supports_attention_backend and not base._is_stateful


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, and all that the model's generation config declares, as far
    as the model can choose them.

    Raises:
        ValueError: there is none, so that no completion could ever end by itself.
    """
    sources: list[Any] = [unwrapped(model).generation_config.eos_token_id, tokenizer.eos_token_id]
    ids = {i for source in sources if source is not None for i in ([source] if isinstance(source, int) else source)}
    if not ids:
        raise ValueError("Neither the tokenizer nor the model's generation config has an end token; set `eos_token`.")
    written = unwrapped(model).config.get_text_config().vocab_size
    known = tuple(sorted(i for i in ids if 0 <= i < written))
    if not known:
        raise ValueError(
            f"No completion could end by itself: the model chooses from {written} tokens, and its end tokens are "
            f"{', '.join(map(str, sorted(ids)))}. Set `tokenizer.eos_token` to a token that the model knows, or call "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    return known


def computing_dtype(model: nn.Module) -> torch.dtype:
    """What the model's matrix products are computed in here: autocast's type, or that of its weights."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def state_of_forward(model: nn.Module) -> tuple[Any, ...]:
    """What a forward pass depends on besides values: where weights lie, and which adapters are on or merged.

    While it stays the same, the pass reads the same addresses in the same way.
    """
    addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    if not is_peft_model(extract_model_from_parallel(model, keep_torch_compile=False)):
        return addresses, ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [(x.disable_adapters, tuple(x.active_adapters), tuple(x.merged_adapters)) for x in layers]
    return addresses, tuple(adapters)


def context_length(model: nn.Module) -> int | None:
    """Most tokens that the model has positions for, or ``None`` where its config does not say."""
    base = unwrapped(model)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:  # recurrent and ALiBi models
        return None
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return positions - module.padding_idx - 1  # RoBERTa and its kin count from behind the padding token's id
    return positions
