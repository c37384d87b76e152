"""Calls of code that is not part of this package: its errors become errors that name that code."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from online_dpo.distributed.settings import kept_settings
from online_dpo.distributed.signals import is_interruption
from online_dpo.distributed.waiting import waiting_for
from online_dpo.errors import (
    ModelFolderError,
    OnlineDPOError,
    ScoringError,
    error_text,
    is_out_of_memory,
    named_error,
    one_line,
)
from online_dpo.types import Group, Prompt

ENDS_COROUTINE = (asyncio.CancelledError, GeneratorExit)
"""What a coroutine gets when it is cancelled or closed."""
SHOWN_CHARACTERS, SHOWN_ROWS = 60, 8

HUB_PROBLEMS = {
    ("gated repo", "restricted"): (
        "the hub gives it to those alone who accepted its terms. Accept them on its page, and log in "
    ),
    ("Revision Not Found", "is not a valid git identifier"): "the hub has no such revision of it (`model_revision`).",
    (
        "couldn't connect",
        "offline mode",
        "outgoing traffic has been disabled",
        "Cannot find the requested files in the disk cache",
        "find the requested files in the local cache",
        "Connection error",
        "Max retries",
        "connection attempts failed",
    ): (
        "there is no such folder here, and the hub cannot be reached to look for a model of that name. "
        "Correct the path, or go online."
    ),
    (
        "is not a local folder and is not a valid model identifier",
        "Repository Not Found",
        "is not a valid model identifier",
        "404",
    ): (
        "there is no such folder here, and no model of that name on the hub (or a private one: log in with "
        "`hf auth login`)."
    ),
    ("Repo id must", "Cannot have -- or ..", "HFValidationError", "Incorrect path_or_model_id"): (
        "there is no such folder here, and it is no name that a model on the hub can have. Correct the path."
    ),
}
"""What libraries say of a name on the hub, and what it means."""
FOLDER_PROBLEMS = {
    ("Weights only load failed", "Unsupported global"): (
        "its weights are a pickle (.bin) that holds more than tensors, or is damaged. None of it was run. "
        "Give weights in safetensors."
    ),
    (
        "Error no file named",
        "no file named",
    ): "it holds no weights, such as model.safetensors. Copy or download it again.",
    ("Couldn't instantiate the backend tokenizer", "Can't load tokenizer"): (
        "it has no tokenizer that can be read. Copy its tokenizer.json and tokenizer_config.json beside the weights."
    ),
    ("contains custom code",): (
        "it needs Python code of its own. Read that code, and set `trust_remote_code: true` if you trust it."
    ),
}
"""The same of a folder."""
LONG_ENDS = (
    " Model type should be one of",
    " You can update Transformers",
    " If you were trying to load",
    " Check your",
)
"""Where a library's message becomes a list or an advice that does not help."""


@contextmanager
def foreign(
    who: str,
    where: str | Callable[[], str] = "",
    raises: Callable[[str], Exception] = ScoringError,
    passes: tuple[type[Exception], ...] = (),
    waits: bool = True,
) -> Iterator[None]:
    """Inside, code of others runs: a user's, or that of a model's or dataset's folder. Its errors are wrapped.

    >>> with foreign("Reward model `rm`", where=lambda: among_rows(groups)):
    ...     scores = model(ids)

    An exception of that code is chained to a new one whose message names the code; one that would end the program, such
    as that of ``sys.exit``, too. Not wrapped are this package's own errors, those in ``passes``, out-of-memory errors
    (a caller may recover from them), and what a signal (Ctrl-C) or the end of a coroutine raises. Settings of the
    process that the code has changed are put back (see `kept_settings`). A notice tells when that code takes long (see
    `distributed.waiting`).

    Args:
        who: the name of the code in the message.
        where: the rows that were processed, for the end of the message; a function is called only if there is an error.
        raises: makes the new error from its message.
        passes: exceptions that are not wrapped.
        waits: whether that code runs here and now, so that it is what this thread waits for.
    """
    try:
        with kept_settings(who), waiting_for(who) if waits else nullcontext():
            yield
    except (OnlineDPOError, *passes):
        raise
    except BaseException as error:
        ends_coroutine = isinstance(error, ENDS_COROUTINE) and _in_event_loop()
        if is_interruption(error) or is_out_of_memory(error) or ends_coroutine:
            raise
        rows = where if isinstance(where, str) else where()
        raise raises(f"{who} raised {named_error(error)}{rows and ' '}{rows}") from error


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Inside, a library reads a model folder or asks the hub for it; its errors then name the folder in one line."""
    try:
        with foreign(f"Loading `{path}`", raises=ModelFolderError, passes=(Exception,)):
            yield
    except (OnlineDPOError, ImportError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_interruption(error):
            raise
        raise ModelFolderError(_loading_problem(path, error)) from error


def _loading_problem(path: str, error: BaseException) -> str:
    """One line for what a library says of a model that it cannot load: of many lines, those that help."""
    text = error_text(error)
    if not os.path.isdir(os.path.expanduser(path)):
        for words, meaning in HUB_PROBLEMS.items():
            if any(word in text for word in words):
                return f"`{path}`: {meaning}"
    for words, meaning in FOLDER_PROBLEMS.items():
        if any(word in text for word in words):
            return f"`{path}`: {meaning}"
    if (broken := _broken_json(Path(path).expanduser())) is not None:
        return f"`{path}`: {broken} is no valid JSON. Copy or download it again."
    for end in LONG_ENDS:
        text = text.partition(end)[0].strip()
    return f"Loading `{path}` raised {type(error).__name__}: {text}"


def _broken_json(folder: Path) -> str | None:
    """The first file of a folder that should be JSON and is not."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError, OSError):
            return file.name
    return None


def at_row(prompt: Prompt) -> str:
    """A description of a prompt for a message: its row in the dataset, and how its text begins."""
    content = prompt.content if isinstance(prompt.content, str) else prompt.content[-1].get("content")
    return f"(row {prompt.row}: {one_line(str(content), SHOWN_CHARACTERS)!r})"


def among_rows(groups: Sequence[Group]) -> str:
    """A description of the prompts of several groups for a message, when the error belongs to one of them."""
    prompts = {group.prompt.row: group.prompt for group in groups}
    if len(prompts) < 2:
        return "".join(at_row(prompt) for prompt in prompts.values())
    rows = list(map(str, prompts))
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"(among rows {', '.join(rows[:SHOWN_ROWS])}{more})"


def callable_name(function: Any) -> str:
    """The name of a callable: a function's ``__name__`` (also inside a ``functools.partial``), else its class name."""
    while not hasattr(function, "__name__") and hasattr(function, "func"):
        function = function.func
    return function.__name__ if hasattr(function, "__name__") else type(function).__name__
