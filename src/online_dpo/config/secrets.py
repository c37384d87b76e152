"""Tokens of the hub in a configuration: what is written, shown or pickled of it holds none."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self

from online_dpo.config.endpoints import secret_fields

FIELD = "hub_token"


class WithoutToken:
    """A configuration that is pickled without its ``hub_token``, as into ``training_args.bin``. Copies keep it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), FIELD: None}

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied


def check_tokens(hub_token: Any, model_init_kwargs: Any) -> None:
    """Check that a token is one, and that there is none where trackers and logs would show it.

    Raises:
        ValueError: one of these; the token is not shown.
    """
    if hub_token is not None and not (isinstance(hub_token, str) and hub_token.isascii() and _is_word(hub_token)):
        raise ValueError(
            f"`{FIELD}` must be the token alone, without blanks and line ends. Better: leave it out and set HF_TOKEN, "
            "or log in with `hf auth login`."
        )
    given = model_init_kwargs if isinstance(model_init_kwargs, Mapping) else {}
    texts = {name: value for name, value in given.items() if not isinstance(value, bool) and value is not None}
    if names := secret_fields(texts):
        raise ValueError(
            f"`model_init_kwargs` holds `{names[0]}`, which trackers and checkpoints would show. Leave it out and set "
            "HF_TOKEN, or log in with `hf auth login`."
        )


def _is_word(text: str) -> bool:
    return text.isprintable() and " " not in text
