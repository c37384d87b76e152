"""Which weights are held in which type: trained ones in fp32, frozen ones as they were saved.

An optimizer's step is a small part of a weight: a millionth or less at the usual learning rates. A weight in bf16 has
eight bits, so that adding less than a 256th of it gives the same weight again, and the step is lost.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.introspection import unwrapped

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
KEEPS_SMALL_STEPS = ("adamw_torch_8bit", "adamw_torch_4bit", "adamw_anyprecision")
"""Optimizers of transformers that round at random, or compensate for rounding, if they are told to."""


def autocast_dtype(args: OnlineDPOConfig) -> torch.dtype | None:
    """What matrix products are computed in under mixed precision; ``None`` where that is off."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def mixed_precision(args: OnlineDPOConfig) -> AbstractContextManager[Any]:
    """Inside, models compute as in training; for what runs outside of the trainer's own context."""
    dtype = autocast_dtype(args)
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)


def given_dtype(init_kwargs: dict[str, Any] | str | None) -> Any:
    """The type that ``model_init_kwargs`` ask for, also under its old name; ``None`` where they do not."""
    assert not isinstance(init_kwargs, str), "TrainingArguments parses text into a dict"
    kwargs = init_kwargs or {}
    return kwargs.get("dtype", kwargs.get("torch_dtype"))


def train_in_fp32(model: nn.Module, args: OnlineDPOConfig, may_hold_all: bool) -> None:
    """Puts an adapter's trained weights into fp32 where PEFT leaves them in half precision: `modules_to_save`, biases.

    Without mixed precision their layers could not work among others in half precision; then the whole model is held in
    fp32 if it may be.

    Args:
        model: with an adapter of ours.
        may_hold_all: the model was loaded here, without a type that was asked for.
    """
    halves = _trained_halves(model)
    if not halves:
        return
    if autocast_dtype(args) is None:
        if may_hold_all and not getattr(model, "is_quantized", False):
            model.float()
        return
    known = {id(half) for half in halves}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in known]
        if own and isinstance(
            module, nn.Embedding
        ):  # what follows is to get what it would from one that is not trained
            module.register_forward_hook(_Rounds(own[0].dtype))
        for parameter in own:
            parameter.data = parameter.data.float()


class _Rounds:
    """A forward hook that gives a layer's output in a type. Picklable, unlike a function in a function."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.dtype)


def check_precision(model: nn.Module, args: OnlineDPOConfig, optimizer: Any, loaded_here: bool) -> None:
    """Warns of trained weights in half precision, unless the optimizer may be one that keeps small steps.

    Raises:
        ValueError: weights in fp16 are to be trained under `fp16`, which torch refuses in the first step.
    """
    halves = _trained_halves(model)
    if not halves:
        return
    if args.fp16 and any(half.dtype == torch.float16 for half in halves):
        raise ValueError(
            "`fp16=True` scales gradients, which torch does for weights in fp32 alone, and the model's are in fp16. "
            + _what_to_do(model, loaded_here)
        )
    torchs_own = optimizer is None or type(optimizer).__module__.startswith("torch.optim")
    if not torchs_own or (optimizer is None and keeps_small_steps(args)):
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.warning(
        "%.0f %% of the trained weights are held in %s, where most of what an optimizer adds is rounded away: in 30 "
        "steps at the default learning rate, 1 %% of the weights changed in bf16, and all in fp32. %s To keep half "
        "precision: optim='stable_adamw' (package torch-optimi) or optim='adamw_torch_8bit' with "
        "optim_args='bf16_stochastic_round=True' (package torchao), see docs/guide.md.",
        100 * sum(half.numel() for half in halves) / trained,
        "/".join(sorted({str(half.dtype).removeprefix("torch.") for half in halves})),
        _what_to_do(model, loaded_here),
    )


def warn_of_other_dtype(ref_model: nn.Module, policy: nn.Module) -> None:
    """A reference in another type than the policy is further from it, from the start, than training has made it."""
    theirs, ours = unwrapped(ref_model).dtype, unwrapped(policy).dtype
    if theirs != ours:
        logger.warning(
            "`ref_model` is in %s and the policy in %s: their log-probabilities differ by rounding before anything is "
            "trained, and KL and rewards count it. Load it with `dtype=%s`, give its folder or name, or leave it out: "
            "the trainer then keeps a copy of the policy.",
            *(str(dtype).removeprefix("torch.") for dtype in (theirs, ours)),
            ours,
        )


def keeps_small_steps(args: OnlineDPOConfig) -> bool:
    """Whether the optimizer that is named loses no step that is too small for a weight in half precision."""
    if args.optim == "stable_adamw":  # it compensates where weights need it, unless told not to
        return True
    options = (args.optim_args or "").replace(" ", "").lower()
    wanted = ("bf16_stochastic_round=true", "use_kahan_summation=true")
    return args.optim in KEEPS_SMALL_STEPS and any(option in options for option in wanted)


def hold_linears(model: nn.Module, args: OnlineDPOConfig) -> None:
    """Holds the linear layers of a frozen model in the type that mixed precision casts them to in each pass.

    Nothing else changes type, so every result stays as it is, bit for bit, at half of the memory of these layers.
    """
    dtype = autocast_dtype(args)
    if dtype is None:
        return
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        if type(module) is nn.Linear and users[id(module.weight)] == 1:  # a tied head is an embedding too
            module.to(dtype)


def _trained_halves(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]


def _what_to_do(model: nn.Module, loaded_here: bool) -> str:
    if is_peft_model(model):
        return "Make the adapter with PEFT's default `autocast_adapter_dtype=True`, or turn `bf16` on."
    if loaded_here:
        return "Leave `dtype` out: then trained weights are loaded in fp32."
    return "Load the model with `dtype=torch.float32`, or give `model` its folder or name instead."
