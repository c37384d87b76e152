"""Python functions as scorers, called in TRL's convention.

Asynchronous functions run on one event loop in its own thread. The loop lives as long as the process, so a client that
a function keeps between calls stays usable. It also works where the calling thread already runs a loop (notebooks).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, callable_name, foreign
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.notes import log_functions
from online_dpo.scoring.protocols import as_number, describe, flat_list, regroup
from online_dpo.scoring.time_limit import await_in_time, call_in_time
from online_dpo.types import Completion, Group, Prompt

BUILT_IN_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class FunctionScorer:
    """A Python function, or an object with ``__call__``, that scores completions; plain or ``async``.

    The function is called once for all groups, with these keyword arguments, each a list of P x K items in the order
    prompt 0 completion 0, prompt 0 completion 1, ..., prompt 1 completion 0, ...:

    - ``prompts``: text, or the list of messages of a conversational prompt;
    - ``completions``: text, or ``[{"role": "assistant", "content": text}]`` for a conversational prompt;
    - ``completion_ids``: list of token ids;
    - every other column of the dataset (``None`` for a prompt without that column; a column named like one of the
      arguments above or below is not passed);

    and these: ``trainer_state``, the result of ``state()``; ``log_metric(name, value)``, which adds a number to the
    metrics; and ``log_extra(column, values)``, which adds a column with one value for each completion to the trainer's
    ``completions``. A function without ``**kwargs`` gets only the arguments that it names. It returns one number for
    each completion (list, tuple, 1-D tensor or array), with ``None`` where it does not apply.

    Args:
        function: the reward function.
        name: name in metrics; by default the function's own name.
        state: returns the ``trainer_state``; called each time before the function.

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: it takes no arguments or a positional-only one, or (when scoring) needs one that does not exist.
        ScoringError: (when scoring) it raised, or returned something that is not one number for each completion.
    """

    def __init__(
        self, function: Callable[..., Any], name: str | None = None, state: Callable[[], Any] | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"A reward function must be callable; this is {describe(function)}.")
        self.name = name or callable_name(function)
        self.is_async = is_async_function(function)
        self.function = function
        self._state = state
        self._parameters = list(inspect.signature(function).parameters.values())
        if not self._parameters:
            raise ScoringError(f"{self._label} takes no arguments. Give it `completions`, what it is to score.")
        for parameter in self._parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
                raise ScoringError(
                    f"{self._label} has the positional-only parameter `{parameter.name}`, but reward functions are "
                    "called with keyword arguments. Remove the `/` from its signature."
                )

    @property
    def _label(self) -> str:
        return f"Reward function `{self.name}`"

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P x K scores. An ``async`` function runs on the shared event loop while this thread waits for it."""
        if self.is_async:
            return wait_for(submit(self.score_async(groups)))
        if not groups:
            return []
        arguments = self._arguments(groups)
        with self._foreign(groups):
            returned = call_in_time(lambda: self.function(**arguments), self._label, lambda: among_rows(groups))
        return self._checked(returned, groups)

    async def score_async(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P x K scores of an ``async`` function."""
        if not groups:
            return []
        arguments = self._arguments(groups)
        with self._foreign(groups):
            returned = await await_in_time(self.function(**arguments), self._label, lambda: among_rows(groups))
        return self._checked(returned, groups)

    def _arguments(self, groups: Sequence[Group]) -> dict[str, Any]:
        samples = [(group.prompt, completion) for group in groups for completion in group.completions]
        column_names = dict.fromkeys(name for group in groups for name in group.prompt.columns)
        # Each completion gets its own copy of values and messages: a function that changes them changes no prompt.
        available: dict[str, Any] = {
            name: [copy.deepcopy(prompt.columns.get(name)) for prompt, _ in samples] for name in column_names
        }
        available["prompts"] = [copy.deepcopy(prompt.content) for prompt, _ in samples]
        available["completions"] = [_completion_argument(prompt, completion) for prompt, completion in samples]
        available["completion_ids"] = [list(completion.token_ids) for _, completion in samples]
        available["trainer_state"] = None if self._state is None else _copied(self._state())
        available["log_extra"], available["log_metric"] = log_functions(len(samples))

        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._parameters):
            wanted = available
        else:
            names = {parameter.name for parameter in self._parameters}
            wanted = {name: value for name, value in available.items() if name in names}
        self.check_columns(column_names)
        return wanted

    def check_columns(self, names: Collection[str], dataset: str = "the dataset") -> None:
        """Check that each argument the function needs is a column or a built-in argument.

        Raises:
            ScoringError: the function needs an argument that is neither.
        """
        for parameter in self._parameters:
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required and parameter.name not in names and parameter.name not in BUILT_IN_ARGUMENTS:
                raise ScoringError(
                    f"{self._label} needs the argument `{parameter.name}`, but {dataset} has no such column. "
                    f"Available columns: {', '.join(names) or 'none'}. Always available: "
                    f"{', '.join(BUILT_IN_ARGUMENTS)}. Rename the argument or give it a default."
                )

    def _foreign(self, groups: Sequence[Group]) -> AbstractContextManager[None]:
        return foreign(self._label, lambda: among_rows(groups))

    def _checked(self, returned: Any, groups: Sequence[Group]) -> list[list[float | None]]:
        items = flat_list(returned, self._label)
        expected = sum(len(group.completions) for group in groups)
        if len(items) != expected:
            raise ScoringError(
                f"{self._label} returned {len(items)} scores for {expected} completions ({len(groups)} prompts). "
                "Return one for each completion, in the order prompt 0 completion 0, prompt 0 completion 1, ..., "
                "prompt 1 completion 0, ..."
            )
        return regroup([self._number(index, item) for index, item in enumerate(items)], groups)

    def _number(self, index: int, item: Any) -> float | None:
        if item is None:
            return None
        value = as_number(item)
        if value is not None:
            return value
        raise ScoringError(
            f"{self._label} returned {describe(item)} at index {index}. Each score must be a number or None."
        )


def is_async_function(function: Any) -> bool:
    """Whether a function is ``async``, also inside a ``functools.partial`` or as an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _copied(state: Any) -> Any:
    """A copy of the trainer's state, with lists of its own (the log): a function that writes into it changes no run."""
    copied = copy.copy(state)
    vars(copied).update({name: [*map(copy.copy, v)] for name, v in vars(state).items() if isinstance(v, list)})
    return copied


def _completion_argument(prompt: Prompt, completion: Completion) -> Any:
    if prompt.is_conversational:
        return [{"role": "assistant", "content": completion.text}]
    return completion.text
