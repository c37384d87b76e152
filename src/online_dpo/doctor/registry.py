"""The registry of checks. A plugin adds one with the decorator `check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from online_dpo.config.registry import Registry
from online_dpo.doctor.findings import Finding

if TYPE_CHECKING:
    from online_dpo.doctor.case import Case

Check = Callable[["Case"], Iterable[Finding]]
"""A function of the run that is examined; it yields what it has found, at least one finding."""

Decorated = TypeVar("Decorated", bound=Check)

LOADS_MODELS = "loads models"
CHECKS: Registry[Check] = Registry("check")


def check(name: str, *, loads_models: bool = False) -> Callable[[Decorated], Decorated]:
    """Registers a check of ``online-dpo doctor``, which runs them in the order of their registration.

    >>> @check("licence")
    ... def licence(case):
    ...     yield ok("the model may be trained") if "apache" in case.subject.model else warning("unknown", "Read it.")

    Args:
        loads_models: the check loads models or samples from them; ``--quick`` leaves it out.

    Raises:
        RegistryError: the name is taken.
    """
    return CHECKS.decorator(name, lambda function: function, [LOADS_MODELS] if loads_models else [])
