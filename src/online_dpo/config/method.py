"""Fields of the configuration that choose the method, and how beta adapts."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from online_dpo.config.checking import check_numbers, epoch_values, nonempty_and_all
from online_dpo.config.field_specs import documented

MethodName = Literal["online_dpo", "xpo", "nash_md"]

HOME = "online_dpo.methods"
"""Where methods are looked for. The name is a string and imported late: methods stand on the stages, which stand on the
configuration, so that an import at the top would be a circle.
"""


@documented
@dataclass
class MethodFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- method -------------------------------------------------------------------------------------------------------

    method: MethodName = "online_dpo"
    """`online_dpo`: all completions of a prompt are the policy's. `xpo` (arXiv 2405.21046): one is the policy's and one
    the reference's, and what the reference says becomes less likely on top of the loss. `nash_md` (arXiv 2312.00886):
    one is the policy's and one that of a mixture of policy and reference, and a policy gradient raises the chance to be
    preferred.
    """

    xpo_alpha: list[float] = field(default_factory=lambda: [1e-5])
    """Weight of `xpo`'s exploration term, 0 or more. A number, or a list with one for each epoch (the last one
    stays).
    """

    mixture_coef: list[float] = field(default_factory=lambda: [0.5])
    """Share of the reference in the mixture that `nash_md` plays against, in [0, 1]: 0 is the policy itself, 1 the
    reference; the paper found 0.125 to 0.375 best. A number, or a list with one for each epoch (the last one stays).
    """

    target_kl: float | None = None
    """Adapt beta so that `objective/kl` comes close to this many nats per completion; above 0. `beta` is then the value
    at the start.
    """

    beta_gain: float = 0.1
    """With `target_kl`: how fast beta adapts. A step changes it by at most 0.2 times this share (arXiv 1909.08593,
    section 2.2); above 0 and below 5.
    """

    beta_range: float = 10.0
    """With `target_kl`: beta stays within this factor of its value at the start; above 1. Without a limit it would fall
    to nothing, and the gradient of most losses with it, while the KL is still small because training has only begun.
    """


def check_method_numbers(args: MethodFields) -> None:
    """Check the numbers of the methods and of an adapting beta.

    Raises:
        ValueError: one is out of range.
    """
    alphas, shares = epoch_values(args.xpo_alpha), epoch_values(args.mixture_coef)
    checks = [
        (
            nonempty_and_all(0 <= alpha < math.inf for alpha in alphas),
            "xpo_alpha",
            "0 or more, or a list of such numbers",
        ),
        (nonempty_and_all(0 <= share <= 1 for share in shares), "mixture_coef", "in [0, 1], or a list of such numbers"),
        (args.target_kl is None or 0 < args.target_kl < math.inf, "target_kl", "above 0"),
        (1 < args.beta_range < math.inf, "beta_range", "above 1"),
        (0 < args.beta_gain < 5, "beta_gain", "above 0 and below 5, so that beta stays above 0"),
    ]
    check_numbers(args, checks)


def method_of(args: MethodFields) -> Any:
    """Returns the `Method` that a configuration names."""
    return importlib.import_module(HOME).METHODS[args.method]


def check_method(args: MethodFields) -> None:
    """Check what the method requires of the configuration.

    Raises:
        ValueError: a field contradicts the method. One that the method does not read gives a warning.
    """
    methods = importlib.import_module(HOME).METHODS
    defaults: dict[str, Any] = {field.name: field.default_factory for field in fields(args)}
    chosen = method_of(args)
    for method in map(methods.__getitem__, get_args(MethodName)):
        for name in method.epoch_fields:
            if name not in chosen.epoch_fields and epoch_values(getattr(args, name)) != defaults[name]():
                warnings.warn(f"Ignored without `method={method.name!r}`: {name}.", stacklevel=4)
    chosen.check(args)
