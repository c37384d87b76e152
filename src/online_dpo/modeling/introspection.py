"""Questions about a model: which arguments it accepts, its dtype, its context length, its end tokens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model inside the wrappers of data parallelism, `torch.compile` and PEFT."""
    wrapped: Any = model
    # A fast path for plain and PEFT models: accelerate takes milliseconds, which would be added to each forward pass.
    if "_orig_mod" not in vars(model):
        if isinstance(model, PreTrainedModel):
            return model
        peft = sys.modules.get("peft")  # if PEFT was never imported, this is not one of its models
        if peft is not None and isinstance(model, peft.PeftModel):
            return wrapped.get_base_model()
    wrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    return wrapped.get_base_model() if is_peft_model(wrapped) else wrapped


def accepts_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's own ``forward`` has a parameter with this name (``**kwargs`` does not count)."""
    return name in inspect.signature(type(unwrapped(model)).forward).parameters


def without_router_logits(model: nn.Module) -> dict[str, Any]:
    """The ``forward`` arguments that turn router logits off in a mixture of experts; empty for other models.

    With router logits a model also computes a load-balancing loss, if its config asks for it. Our loss does not contain
    it, and its code fails with masks of more than two dimensions and when decoding token by token.
    """
    return {"output_router_logits": False} if accepts_argument(model, "output_router_logits") else {}


def passes_kwargs_to_attention(model: nn.Module) -> bool:
    """Whether this is a model of `transformers` whose layers pass further keyword arguments on to an exchangeable
    attention function, and whose only state while decoding is a key/value cache.
    """
    base: Any = unwrapped(model)
    return isinstance(base, PreTrainedModel) and base._supports_attention_backend and not base._is_stateful


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of all tokens that end a completion: the tokenizer's end token and those of the model's generation
    config. Ids outside of the model's vocabulary are left out.

    Raises:
        ValueError: none is left, so no completion could end before ``max_new_tokens``.
    """
    sources: list[Any] = [unwrapped(model).generation_config.eos_token_id, tokenizer.eos_token_id]
    ids = {i for source in sources if source is not None for i in ([source] if isinstance(source, int) else source)}
    if not ids:
        raise ValueError("Neither the tokenizer nor the model's generation config has an end token; set `eos_token`.")
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    usable = tuple(sorted(i for i in ids if 0 <= i < vocabulary))
    if not usable:
        raise ValueError(
            f"No completion could end by itself: the model chooses from {vocabulary} tokens, and its end tokens are "
            f"{', '.join(map(str, sorted(ids)))}. Set `tokenizer.eos_token` to a token that the model knows, or call "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    return usable


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's matrix products at this point: autocast's, if it is on, else that of the weights; of a
    quantised model the coarser of it and of what its quantised layers compute in.
    """
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(device)
    weights = next(p.dtype for p in model.parameters() if p.is_floating_point())
    plain = torch.get_autocast_dtype(device) if autocast else weights
    return max({plain, *(_computed_in(layer) for _, layer in layers_in_bits(model))}, key=lambda d: torch.finfo(d).eps)


def is_quantized(model: nn.Module) -> bool:
    """Whether linear layers of the model are quantised, in whatever way, so that an adapter cannot be merged."""
    return bool(getattr(unwrapped(model), "is_quantized", False))


def is_quantized_by_bitsandbytes(model: nn.Module) -> bool:
    """Whether bitsandbytes holds linear layers of the model in 4 or 8 bits."""
    base: Any = unwrapped(model)
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


def layers_in_bits(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers that bitsandbytes holds in 4 or 8 bits, with their names."""
    if is_quantized_by_bitsandbytes(model):
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        for name, module in unwrapped(model).named_modules():
            if isinstance(module, (Linear4bit, Linear8bitLt)):
                yield name, module


def _computed_in(layer: Any) -> torch.dtype:
    """The dtype whose rounding error the products of a quantised layer have."""
    # In 8 bits a layer rounds what it reads as well, to about as many significant bits as bf16 has.
    return getattr(layer, "compute_dtype", torch.bfloat16) or torch.float32


def forward_state_key(model: nn.Module) -> tuple[Any, ...]:
    """A key for captured forward passes: the addresses of all weights, which adapters are active or merged, and scales.

    While it is the same, a forward pass runs the same operations on the same addresses, so its CUDA graph is valid.
    """
    addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    if not is_peft_model(extract_model_from_parallel(model, keep_torch_compile=False)):
        return addresses, (), ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [(x.disable_adapters, tuple(x.active_adapters), tuple(x.merged_adapters)) for x in layers]
    scales = [str(vars(layer).get("scaling")) for layer in layers]  # numbers, which are constants in a graph
    return addresses, tuple(adapters), tuple(scales)


def context_length(model: nn.Module) -> int | None:
    """The largest number of tokens that the model has positions for; ``None`` if its config has no such limit."""
    base = unwrapped(model)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:  # recurrent models, and those with ALiBi
        return None
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # Models like RoBERTa number positions from the padding id + 1 on, so the first ones are never used.
            return positions - module.padding_idx - 1
    return positions
