"""The dtypes of weights: trained ones are held in fp32, frozen ones as they were saved.

An optimizer's step is a small part of a weight: a millionth or less at the usual learning rates. A weight in bf16 has
eight significant bits, so adding less than a 256th of its value gives the same weight again, and the step is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.introspection import unwrapped

logger = logging.getLogger(__name__)

HALF_PRECISION = (torch.bfloat16, torch.float16)
KEEPS_SMALL_STEPS = ("adamw_torch_8bit", "adamw_torch_4bit", "adamw_anyprecision")
"""Optimizers of transformers that have options for stochastic rounding or Kahan summation."""


def autocast_dtype(args: OnlineDPOConfig) -> torch.dtype | None:
    """The dtype of matrix products under mixed precision; ``None`` if mixed precision is off."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def mixed_precision(args: OnlineDPOConfig) -> AbstractContextManager[Any]:
    """Inside, models compute in the same precision as in training; for code outside the trainer's autocast context."""
    dtype = autocast_dtype(args)
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, code of others computes in the dtypes that it chooses, whatever mixed precision there is around it."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def given_dtype(init_kwargs: dict[str, Any] | str | None) -> Any:
    """The dtype in ``model_init_kwargs``, also under its old name ``torch_dtype``; ``None`` if there is none."""
    assert not isinstance(init_kwargs, str), "TrainingArguments parses text into a dict"
    kwargs = init_kwargs or {}
    return kwargs.get("dtype", kwargs.get("torch_dtype"))


def train_in_fp32(model: nn.Module, args: OnlineDPOConfig, may_hold_all: bool) -> None:
    """Casts trained weights of an adapter to fp32 where PEFT leaves them in half precision: `modules_to_save`, biases.

    Without mixed precision a layer in fp32 does not work between layers in half precision. Then the whole model is cast
    to fp32, if ``may_hold_all``.

    Args:
        model: a model with an adapter.
        may_hold_all: whether the dtype of the base model is ours to choose: we loaded it, and no dtype was asked for.
    """
    half_weights = _trained_half_precision(model)
    if not half_weights:
        return
    if autocast_dtype(args) is None:
        if may_hold_all and not getattr(model, "is_quantized", False):
            model.float()
        return
    known = {id(half) for half in half_weights}
    for module in model.modules():
        trained = [p for p in module.parameters(recurse=False) if id(p) in known]
        if trained and isinstance(module, nn.Embedding):
            # Autocast does not touch embeddings: without the cast, all later layers would get fp32 activations.
            module.register_forward_hook(_CastOutput(trained[0].dtype))
        for parameter in trained:
            parameter.data = parameter.data.float()


class _CastOutput:
    """A forward hook that casts a layer's output. A class, because a nested function could not be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.dtype)


def check_precision(model: nn.Module, args: OnlineDPOConfig, optimizer: Any, loaded_here: bool) -> None:
    """Warns about trained weights in half precision, unless the optimizer can keep small steps.

    Raises:
        ValueError: weights in fp16 would be trained with ``fp16=True``, which torch refuses at the first step.
    """
    half_weights = _trained_half_precision(model)
    if not half_weights:
        return
    if args.fp16 and any(half.dtype == torch.float16 for half in half_weights):
        raise ValueError(
            "`fp16=True` scales gradients, which torch can do only for weights in fp32; the model's are in fp16. "
            + _remedy(model, loaded_here)
        )
    from_torch = optimizer is None or type(optimizer).__module__.startswith("torch.optim")
    if not from_torch or (optimizer is None and keeps_small_steps(args)):
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.warning(
        "%.0f %% of the trained weights are held in %s, where most of what an optimizer adds is rounded away: in 30 "
        "steps at the default learning rate, 1 %% of the weights changed in bf16, and all in fp32. %s To keep half "
        "precision: optim='stable_adamw' (package torch-optimi) or optim='adamw_torch_8bit' with "
        "optim_args='bf16_stochastic_round=True' (package torchao), see docs/guides/models.md.",
        100 * sum(half.numel() for half in half_weights) / trained,
        "/".join(sorted({str(half.dtype).removeprefix("torch.") for half in half_weights})),
        _remedy(model, loaded_here),
    )


def warn_of_other_dtype(ref_model: nn.Module, policy: nn.Module) -> None:
    """Warns if the reference has another dtype than the policy: rounding error would then count as KL and reward."""
    reference_dtype, policy_dtype = unwrapped(ref_model).dtype, unwrapped(policy).dtype
    if reference_dtype != policy_dtype:
        logger.warning(
            "`ref_model` is in %s and the policy in %s: their log-probabilities differ by rounding before anything is "
            "trained, and KL and rewards count it. Load it with `dtype=%s`, give its folder or name, or leave it out: "
            "the trainer then keeps a copy of the policy.",
            *(str(dtype).removeprefix("torch.") for dtype in (reference_dtype, policy_dtype)),
            policy_dtype,
        )


def keeps_small_steps(args: OnlineDPOConfig) -> bool:
    """Whether the configured optimizer also applies steps that are too small for a weight in half precision."""
    if args.optim == "stable_adamw":  # Kahan summation is on by default
        return True
    options = (args.optim_args or "").replace(" ", "").lower()
    wanted = ("bf16_stochastic_round=true", "use_kahan_summation=true")
    return args.optim in KEEPS_SMALL_STEPS and any(option in options for option in wanted)


def hold_linears(model: nn.Module, args: OnlineDPOConfig) -> None:
    """Casts the linear layers of a frozen model to the dtype that autocast would cast them to in each pass.

    All other weights keep their dtype, so every result is the same, bit for bit, with half the memory for these layers.
    """
    dtype = autocast_dtype(args)
    if dtype is None:
        return
    use_count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            use_count[id(parameter)] = use_count.get(id(parameter), 0) + 1
    for module in model.modules():
        if type(module) is nn.Linear and use_count[id(module.weight)] == 1:  # a tied head is the embedding's weight too
            module.to(dtype)


def _trained_half_precision(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights in half precision."""
    return [p for p in model.parameters() if p.requires_grad and p.dtype in HALF_PRECISION]


def _remedy(model: nn.Module, loaded_here: bool) -> str:
    """What the user can do, for the end of a message."""
    if is_peft_model(model):
        return "Make the adapter with PEFT's default `autocast_adapter_dtype=True`, or turn `bf16` on."
    if loaded_here:
        return "Leave `dtype` out: then trained weights are loaded in fp32."
    return "Load the model with `dtype=torch.float32`, or give `model` its folder or name instead."
