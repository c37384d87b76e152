"""Fields of the configuration that say how prompts are read from the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from online_dpo.config.checking import check_numbers
from online_dpo.config.field_specs import documented


@documented
@dataclass
class DataFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- data -------------------------------------------------------------------------------------------------------

    prompt_column: str | None = None
    """Column that holds the prompt. When not set: `prompt`, else `messages`, else the prompt of a `chosen`
    transcript.
    """

    prompt_template: str | None = None
    """Text of the prompt with column names in braces, such as `"Question: {question}\\nAnswer:"`. Replaces
    `prompt_column`.
    """

    chat_template_kwargs: dict[str, Any] | str | None = None
    """Passed to the chat template of conversational prompts, such as `{"enable_thinking": false}`."""

    invalid_prompts: Literal["error", "filter"] = "error"
    """A row that is no usable prompt (empty, wrong type, no room for a completion): `error` stops and names the row,
    `filter` leaves it out and counts it."""

    dataset_num_proc: int | None = None
    """Processes that prepare the dataset."""


def check_data(args: DataFields) -> None:
    """Check how prompts are read.

    Raises:
        ValueError: a number is out of range.
    """
    processes = args.dataset_num_proc
    check_numbers(args, [(processes is None or processes >= 1, "dataset_num_proc", "at least 1")])
