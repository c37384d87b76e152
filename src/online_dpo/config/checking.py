"""Helpers that the checks of all groups of fields share: choices, numbers, options that nothing reads.

A group checks its own fields in its own file. Nothing heavy may be imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from online_dpo.config.field_specs import specs_of
from online_dpo.config.hf_ranges import shown
from online_dpo.config.registry import known_names, nearest

EPOCH_FIELDS = ("beta", "xpo_alpha", "mixture_coef")
"""Fields that may hold a number for each epoch."""


def check_choices(args: object, unread: Collection[str] = ()) -> None:
    """Check every field whose type is a ``Literal``, or may be a list of its values.

    Args:
        unread: fields that nothing will read, whatever they hold.

    Raises:
        ValueError: a field, or an item of its list, is none of its choices.
    """
    for spec in specs_of(type(args)).values():
        value = getattr(args, spec.name)
        may_be_unset = "None" in spec.annotation
        if spec.name not in unread and spec.choices and not (value is None and may_be_unset):
            check_choice(spec.name, value, known_names(spec.name, spec.choices))


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check the value of one field, or each item of it if it is a list.

    Raises:
        ValueError: it is none of those that are allowed; the message names the nearest one.
    """
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if item not in allowed:
            hint = nearest(str(item), allowed)
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; it is {item!r}.{hint}")


def check_numbers(
    args: object, checks: Sequence[tuple[bool, str, str]], values: Mapping[str, Any] | None = None
) -> None:
    """Check numbers, each given as whether it is right, its field, and what the field must be.

    Args:
        values: values that were checked in place of the configuration's own, by field.

    Raises:
        ValueError: one is not right; the message names the field, what it must be, and its value.
    """
    for holds, name, wanted in checks:
        if not holds:
            value = (values or {}).get(name, getattr(args, name))
            text = shown(value) if isinstance(value, int) else repr(value)
            raise ValueError(f"`{name}` must be {wanted}; it is {text}.")


def warn_ignored(names: Sequence[str], why: str) -> None:
    """Warn of options that are set and not read. To be called by a group's check itself: the warning then points to
    the line that made the configuration.

    >>> warn_ignored(["beta_gain"], "without `target_kl`")  # Ignored without `target_kl`: beta_gain.
    """
    if names:
        warnings.warn(f"Ignored {why}: {', '.join(names)}.", stacklevel=5)


def epoch_values(value: float | Sequence[float]) -> list[float]:
    """A field that holds a number, or one for each epoch, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportReturnType]


def nonempty_and_all(holds: Iterable[bool]) -> bool:
    """Whether there is at least one, and all hold."""
    outcomes = list(holds)
    return bool(outcomes) and all(outcomes)
