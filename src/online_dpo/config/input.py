"""What command lines and YAML files hand over, brought to what Python hands over.

``HfArgumentParser`` and TRL's parser know one type for each field: a field that may be one word or several comes as a
list of one, a mapping as text. YAML reads ``1e-6`` as text and ``off`` as false.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

ONE_OR_SEVERAL = ("beta", "xpo_alpha", "mixture_coef", "loss_type", "reward_normalization")
NUMBERS = ("beta", "xpo_alpha", "mixture_coef", "loss_weights", "reward_weights")
MAPPINGS = ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs")
FALSE_WORDS = ("off", "no")


def settle_input(args: OnlineDPOConfig, choices: Sequence[tuple[str, Sequence[str]]]) -> None:
    """
    Raises:
        ValueError: a mapping is no JSON object, or what should be a number is none.
    """
    for name in MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str):
            setattr(args, name, mapping_from_text(name, value))
    for name in NUMBERS:
        value = getattr(args, name)
        several = isinstance(value, (list, tuple))
        if any(isinstance(item, str) for item in (value if several else [value])):
            numbers = [_number(name, item) for item in (value if several else [value])]
            setattr(args, name, numbers if several else numbers[0])
    for name in ONE_OR_SEVERAL:
        value = getattr(args, name)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            setattr(args, name, value[0])
    for name, allowed in choices:
        words = [word for word in allowed if word in FALSE_WORDS]
        if words and getattr(args, name) is False:
            setattr(args, name, words[0])


def mapping_from_text(name: str, text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: the text is no JSON object; the message begins with the field's ``name``.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a dict, or a JSON object as text; it is {text!r}.")
    return value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must hold numbers; it holds {value!r}.") from None
