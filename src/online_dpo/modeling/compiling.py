"""Functions of tensors that Inductor compiles into a few kernels, with a limit of recompilations of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo import config, maybe_mark_dynamic
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException

from online_dpo.distributed.device_memory import whole_device

logger = logging.getLogger(__name__)

RECOMPILATIONS = 64
"""Variants of one function: of types, of optional arguments, of numbers of columns. Dynamo's own limit is 8 for each
function, after which it goes on uncompiled."""


@contextmanager
def recompilation_limit(compilations: int) -> Iterator[None]:
    """Inside, a compiled function may be compiled so often; once more is an error, and no slower run without a word.

    Up to 2.12, torch has one limit for all functions and threads of a process. So it is set for the time of a call, and
    by one thread at a time (`whole_device`): reward models compute in another.
    """
    with whole_device, config.patch(recompile_limit=compilations, fail_on_recompile_limit_hit=True):
        yield


class CompiledFunction:
    """A pure function of tensors, compiled at its first call, for any length of their first dimension.

    If it cannot be compiled, a warning says so once, and from then on it runs as it is: the same values, more slowly
    and with more memory.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # Without `fullgraph`, under which torch 2.13 raises inside of any dispatch mode: that of a count of operations.
        self._compiled: Callable[..., Any] | None = torch.compile(function)

    def __call__(self, *args: Any) -> Any:
        """Calls the function. The other dimensions of its tensors are compiled in: they are those of a model."""
        if self._compiled is None:
            return self.function(*args)
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.dim():
                maybe_mark_dynamic(arg, 0)
        try:
            with recompilation_limit(RECOMPILATIONS):
                return self._compiled(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else None
            if isinstance(cause, torch.OutOfMemoryError):  # the caller tries it with less
                raise cause from None
            self._compiled = None
            logger.warning(
                "`%s` could not be compiled and runs uncompiled, which is slower and takes more memory: %s: %s",
                self.function.__name__,
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            return self.function(*args)
