"""Warnings about truncated prompts: for a dataset when it is prepared, for a stream while it is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.config.trainer_config import OnlineDPOConfig

logger = logging.getLogger(__name__)

CUT = "prompts/cut"
"""Metric: the number of truncated prompts since the last log."""


def cut_message(name: str, cut: int, total: int, args: OnlineDPOConfig) -> str:
    """The warning that prompts are truncated: how many, to how many tokens, and which option avoids it."""
    if args.max_prompt_length is not None and args.prompt_limit == args.max_prompt_length:
        rule, remedy = "`max_prompt_length`", "Raise it"
    else:
        rule = f"`max_length` ({args.max_length}) - `max_new_tokens` ({args.max_new_tokens})"
        remedy = "Raise `max_length`"
    return (
        f"{name}: {cut} of {total} prompts are longer than {args.prompt_limit} tokens, which is {rule}; they are cut "
        f"on the left. {remedy}, or leave them out with `truncate_prompts: false` and `invalid_prompts: filter`."
    )


class CutPromptsCallback(TrainerCallback):
    """Warns once that a stream has truncated prompts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Warn at the first log that counts truncated prompts."""
        cut = int((logs or {}).get(CUT, 0))
        if cut and not self._has_warned and state.is_world_process_zero:
            assert logs is not None and isinstance(args, OnlineDPOConfig)
            logger.warning(cut_message(f"{self._name}, since the last log", cut, int(logs["prompts"]), args))
            self._has_warned = True
