"""Captures a step in a CUDA graph, and leaves nothing behind in torch where that fails.

`torch.cuda.graph` ends a capture with `CUDAGraph.capture_end`, also after an error. Where the capture has become
invalid (a call that none may contain, such as a library's own allocation), `capture_end` raises before it has told
anybody that the capture is over, in torch 2.11 as in 2.13. Then

- the allocator goes on recording to the graph's memory pool: the next `torch.cuda.empty_cache` fails with
  "captures_underway.empty() INTERNAL ASSERT FAILED", and the pool is never freed;
- (2.11) the generator believes that it is being captured: the next random number, and the next replay of any graph,
  fails with "Offset increment outside graph capture encountered unexpectedly";
- the allocator of pinned memory keeps a pointer to the graph, and takes no second capture into the same pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from online_dpo.distributed.device_memory import whole_device
from online_dpo.errors import is_out_of_memory, named_error

_still_pointed_at: list[torch.cuda.CUDAGraph] = []
"""Graphs, empty ones, to which the allocator of pinned memory keeps pointers for as long as the process lives."""


class NotCapturableError(RuntimeError):
    """A step contains an operation that cannot be captured in a CUDA graph, or its capture fails."""


def capture(graph: torch.cuda.CUDAGraph, step: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> Any:
    """Captures a step, which has been run before, and returns its result. Called with ``stream`` as the current one.

    After an error the pool must not be used again.

    Raises:
        NotCapturableError: the capture fails.
        RuntimeError: memory ran out; such an error passes as it is.
    """
    failed: list[BaseException] = []

    def run() -> Any:
        try:
            return step()
        except BaseException as error:
            failed.append(error)  # `capture_end` may raise another one, which says less
            raise

    # The graph must not read copies in autocast's cache, which is emptied later; nor may later code find the
    # copies in it that the graph makes, whose memory belongs to the graph.
    torch.clear_autocast_cache()
    with whole_device:
        try:
            # `thread_local`: another thread may score on the same GPU, and its calls must not fail the capture.
            with (
                _own_random_state(stream.device_index),
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
            ):
                return run()
        except BaseException as error:
            _end(graph, pool, stream.device_index)
            raise _to_raise(failed.pop() if failed and not is_out_of_memory(error) else error)  # noqa: B904
        finally:
            torch.clear_autocast_cache()


def _to_raise(error: BaseException) -> BaseException:
    if is_out_of_memory(error) or not isinstance(error, Exception):
        return error
    named = NotCapturableError(f"its capture fails with {named_error(error, first_line=True)}")
    named.__cause__ = error
    return named


@contextmanager
def _own_random_state(device: int) -> Iterator[None]:
    """Inside, the device's generator has a copy of its state, which the graph takes part in in place of the state
    itself: where the capture fails, that one was never captured. The steps of a decoder draw nothing from it.
    """
    generator = torch.cuda.default_generators[device]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


def _end(graph: torch.cuda.CUDAGraph, pool: Any, device: int) -> None:
    """Does what `capture_end` has not done, and frees what the graph holds."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        pass  # it has been done: only what follows it has failed, such as the instantiation
    else:
        torch._C._cuda_releasePool(device, pool)  # `capture_begin` took it; `reset` gives back that of whole captures
        _still_pointed_at.append(graph)
    graph.reset()
