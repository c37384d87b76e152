"""What may be given to a chat template: the variables that it reads, not what it is or how it is tokenised."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from online_dpo.data.convert import without_nulls
from online_dpo.data.text import UnusablePrompt

_DATA = ("tools", "documents")
"""Arguments of `apply_chat_template` that are variables of the template as well."""

_OWN_TEMPLATE = "chat_template"
"""What the configuration may say, since it is the user's, and a row of the data may not."""


def reserved_arguments(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names that are no variables of a chat template: they say how it is applied, or what the special tokens are."""
    parameters = inspect.signature(type(tokenizer).apply_chat_template).parameters.values()
    own = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return (own | {"messages"} | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)) - {"self", *_DATA}


def check_arguments(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the `chat_template_kwargs` of a configuration.

    Raises:
        ValueError: they hold an argument that is set for each prompt here.
    """
    if reserved := sorted(reserved_arguments(tokenizer) & set(given) - {_OWN_TEMPLATE}):
        raise ValueError(
            f"`chat_template_kwargs` must not hold {', '.join(reserved)}: set for each prompt here. Leave it out."
        )


def row_arguments(own: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `chat_template_kwargs` of a row of the data.

    Raises:
        UnusablePrompt: they are no mapping, or would replace the template or how it is applied.
    """
    if not isinstance(own, Mapping):
        raise UnusablePrompt(f"its `chat_template_kwargs` are of type {type(own).__name__}, not a dict")
    given = without_nulls(own)
    if reserved := sorted(reserved_arguments(tokenizer) & set(given)):
        raise UnusablePrompt(
            f"its `chat_template_kwargs` hold {', '.join(reserved)}, but a row sets variables of the chat template only"
        )
    return given
