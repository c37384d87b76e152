"""Steps that always do the same on the same memory: captured once as a CUDA graph, replayed from then on.

Launching the kernels of a decoding step one by one takes a GPU longer than running them, with all but large models. A
graph launches all of them at once. It reads and writes the addresses it was captured with, and nothing in it may wait
for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST_GRAPHS = 64
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {
    torch.ops.aten.index.Tensor: 1,
    torch.ops.aten.index_put.default: 1,
    torch.ops.aten.index_put_.default: 1,
    torch.ops.aten._index_put_impl_.default: 1,
}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NotCapturableError(RuntimeError):
    """A step does what no CUDA graph can do."""


class CapturableOnly(TorchDispatchMode):
    """While it is on, in this thread, an operation that makes the host wait for its result is an error.

    Such are all whose result or shape depends on values (``item``, ``nonzero``, indexing with a mask) and copies
    between devices.

    Raises:
        NotCapturableError: on such an operation.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INDEXING:
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[INDEXING[func]])
        else:
            waits = bool(WAITING_TAGS & set(func.tags))
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            waits = len({x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}) > 1
        if func is torch.ops.aten.lift_fresh.default:  # what `torch.tensor` makes comes from the host
            waits = result.device.type != "cpu"
        if waits:
            raise NotCapturableError(f"{func} makes the host wait for the device")
        return result


class StepGraphs:
    """Runs steps; on a GPU as CUDA graphs, of which the ones used last are kept, in one pool of memory.

    Without a GPU a step just runs. The first time, in both cases, it runs under `CapturableOnly`.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self.most = most
        self.captured = 0
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph | None, Any]] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], Any], device: torch.device) -> Any:
        """What ``step`` returns. Its tensors hold it until the next run of a step.

        Args:
            key: names all that the step does, and on which memory; steps with the same key are one.
            step: may run more often than once: it writes the same each time.

        Raises:
            NotCapturableError: the step cannot be captured.
        """
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # now the last in order
        else:
            while len(self._graphs) >= self.most:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture(step, device)
            self.captured += 1
        graph, result = self._graphs[key]
        if graph is None:
            return step()
        graph.replay()
        return result

    def release(self) -> None:
        """Drop all graphs and the memory that their results are in."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, step: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph | None, Any]:
        if device.type != "cuda":
            with CapturableOnly():
                step()
            return None, None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            with CapturableOnly():
                step()  # libraries set themselves up in their first call, which cannot be captured
            # A graph may neither read what autocast has cast before nor leave to others what it casts itself.
            torch.clear_autocast_cache()
            # Only this thread's calls are checked: another one may be scoring on the same GPU.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = step()
            torch.clear_autocast_cache()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return graph, result
