"""Models whose weights bitsandbytes holds in 4 or 8 bits: what they compute in, and what makes them trainable (QLoRA).

The packed weights of a layer are a uint8 tensor of another shape; their scales are kept beside it, and are no
parameters. Nothing but the adapter over them is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from online_dpo.modeling.introspection import is_quantized, is_quantized_by_bitsandbytes, layers_in_bits, unwrapped

HALF_PRECISION = (torch.bfloat16, torch.float16)
PACKED_FOR_CPU = (
    "`{argument}` was used on this CPU before, and bitsandbytes has packed its 4-bit weights for reading alone: no "
    "gradient goes through them any more. Load it again, and give it before it has computed anything."
)


def keep_differentiable(model: nn.Module, argument: str) -> None:
    """Keeps gradients flowing through 4-bit layers on a CPU; says once what is said in each pass otherwise.

    On a CPU that multiplies in bf16, bitsandbytes packs a layer's weights anew at the first pass in evaluation mode, in
    place, with scales rounded to bf16. Layers that are packed so have no gradient, silently, and cannot be unpacked.

    Args:
        argument: the one that the model was given as.

    Raises:
        ValueError: that has happened to a layer.
    """
    for _, layer in layers_in_bits(model):
        quiet_casts()
        if _is_4bit(layer):
            if getattr(_state(layer), "packing_format_for_cpu", False):  # set when it happens, alone
                raise ValueError(PACKED_FOR_CPU.format(argument=argument))
            layer.support_avx512bf16_for_cpu = False


def ready_for_adapter(model: Any) -> Any:
    """Returns a quantised model frozen, with its other weights (embeddings, norms, head) in fp32; others unchanged."""
    if not is_quantized_by_bitsandbytes(model):
        return model
    from peft import prepare_model_for_kbit_training

    # Trainer turns checkpointing on, as the run asks for it
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def check_biases(model: nn.Module) -> None:
    """Checks that no trained bias is held in half precision by its layer.

    Raises:
        ValueError: bitsandbytes casts one to the type of products, in place, in every pass.
    """
    for name, layer in layers_in_bits(model):
        bias = layer.bias
        if bias is not None and bias.requires_grad and getattr(layer, "compute_dtype", None) in HALF_PRECISION:
            raise ValueError(
                f"`{name}.bias` is to be trained, and bitsandbytes rounds it to "
                f"{str(layer.compute_dtype).removeprefix('torch.')} in every pass, so that small steps are lost. Set "
                "`bnb_4bit_compute_dtype` to float32, or leave biases out of the adapter (`bias`)."
            )


def quiet_casts() -> None:
    """Lets bitsandbytes say once, and not in each layer and pass, that it casts what an 8-bit layer reads."""
    said = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(one, _Once) for one in said.filters):
        said.addFilter(_Once())


class _Once(logging.Filter):
    """Passes each text a single time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new


def named_numbers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters whose numbers mean something, with their names. Packed weights do not, even where they are stored
    as floats (``bnb_4bit_quant_storage``); their scales stand in their place. Where a number of a block was not finite,
    or all were zero, its scale is.
    """
    layers = {id(layer.weight): layer for _, layer in layers_in_bits(model)}
    for name, parameter in model.named_parameters():
        layer = layers.get(id(parameter))
        yield name, parameter if layer is None else _scales(layer)


def sizes(model: nn.Module) -> Iterable[tuple[int, str, bool]]:
    """For each parameter the count of its numbers, their type, and whether it is trained; of packed ones as they were
    before.
    """
    packed = {id(layer.weight): layer for _, layer in layers_in_bits(model)}
    for parameter in model.parameters():
        layer = packed.get(id(parameter))
        count, kind = parameter.numel(), str(parameter.dtype).removeprefix("torch.")
        if layer is not None and _is_4bit(layer):
            state = _state(layer)
            count, kind = state.shape.numel(), state.quant_type
        yield count, kind, parameter.requires_grad


def describe(model: nn.Module) -> str | None:
    """How the model's weights are quantised, such as ``nf4``; ``None`` if they are not."""
    kinds = {kind: None for _, kind, _ in sizes(model) if kind in ("nf4", "fp4", "int8")}
    if kinds:
        return " and ".join(kinds)
    base: Any = unwrapped(model)
    return str(getattr(base.quantization_method, "value", base.quantization_method)) if is_quantized(model) else None


def _scales(layer: Any) -> torch.Tensor:
    """The scales of a layer, one for each block of numbers or for each row."""
    from bitsandbytes.functional import dequantize_blockwise

    if not _is_4bit(layer):
        return (layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB)[:, None]
    state = _state(layer)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return scales[:, None]  # a matrix, as the weights were


def _state(layer: Any) -> Any:
    """The shape, type and scales of a layer in 4 bits. FSDP2 puts parameters of its own in the weight's place, and the
    layer is left with the state alone.
    """
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _is_4bit(layer: nn.Module) -> bool:
    from bitsandbytes.nn.modules import Linear4bit

    return isinstance(layer, Linear4bit)
