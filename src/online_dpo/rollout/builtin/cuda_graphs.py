"""CUDA graphs: a step that always runs the same kernels on the same addresses is captured once and then replayed.

With all but large models, launching the kernels of a decoding step one by one takes longer than running them on the
GPU. A graph launches all of them at once. It reads and writes the addresses it was captured with, and no operation in
it may synchronise with the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from online_dpo.distributed.device_memory import empty_device_cache
from online_dpo.modeling.memory import in_memory
from online_dpo.rollout.builtin.capture import NotCapturableError, capture
from online_dpo.rollout.builtin.compiled_steps import StepCompiler

MAX_GRAPHS = 64
SYNCHRONISING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {
    torch.ops.aten.index.Tensor: 1,
    torch.ops.aten.index_put.default: 1,
    torch.ops.aten.index_put_.default: 1,
    torch.ops.aten._index_put_impl_.default: 1,
}
"""Operations that synchronise if an index is a mask, and the number of the argument that holds the indices."""
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class CapturableOnly(TorchDispatchMode):
    """Inside, and in this thread, an operation that synchronises with the host is an error.

    These are operations whose result or shape depends on values (``item``, ``nonzero``, indexing with a mask) and
    copies between devices. The check works without a GPU, so tests on a CPU find steps that could not be captured.

    Raises:
        NotCapturableError: on such an operation.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INDEXING:
            synchronises = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[INDEXING[func]])
        else:
            synchronises = bool(SYNCHRONISING_TAGS & set(func.tags))
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            synchronises = len({x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}) > 1
        if func is torch.ops.aten.lift_fresh.default:  # a call of `torch.tensor`, whose values come from the host
            synchronises = result.device.type != "cpu"
        if synchronises:
            raise NotCapturableError(f"{func} makes the host wait for the device")
        return result


class StepGraphs:
    """Runs steps: on a GPU as CUDA graphs, which share one memory pool, elsewhere directly.

    The most recently used graphs are kept (LRU). The first run of a step is under `CapturableOnly`, also without a GPU.

    Args:
        max_graphs: the number of graphs to keep.
        compiler: compiles what steps consist of, after their first run and before they are captured.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS, compiler: StepCompiler | None = None) -> None:
        self.max_graphs = max_graphs
        self.compiler = compiler or StepCompiler(wanted=False)
        self.captured = 0
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph | None, Any]] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], Any], device: torch.device) -> Any:
        """Runs the step and returns its result, whose tensors are valid until the next step runs.

        Args:
            key: identifies what the step computes and the addresses it uses; steps with equal keys share a graph.
            step: may be called more than once, so it must write the same values each time.

        Raises:
            NotCapturableError: the step cannot be captured. Then, and where memory runs out, all graphs are freed.
        """
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)  # moves it to the end: the most recently used
        else:
            while len(self._graphs) >= self.max_graphs:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._captured(step, device)
            self.captured += 1
        graph, result = self._graphs[key]
        if graph is None:
            return self.compiler.run(step)
        graph.replay()
        return result

    def release(self) -> None:
        """Frees all graphs and the memory of their results."""
        self._graphs.clear()
        self._pool = self._stream = None

    def _captured(self, step: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph | None, Any]:
        """A new graph. Where there is no memory for it, the others are freed for it."""
        compiles = self.compiler.wanted
        try:
            with in_memory() as attempt:
                return self._capture(step, device)
            assert not attempt.fits
            self.release()
            empty_device_cache()
            return self._capture(step, device)
        except Exception:
            self.release()
            if compiles and not self.compiler.wanted:  # compiled code could not be captured; the step itself may be
                return self._captured(step, device)
            raise

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
        try:
            with torch.cuda.stream(self._stream):
                with CapturableOnly():  # a warm-up: the first calls of libraries such as cuBLAS cannot be captured
                    step()
                return graph, self._captured_compiled(graph, step)
        finally:  # also after an error: buffers that this stream may still write to are freed for others
            torch.cuda.current_stream(device).wait_stream(self._stream)

    def _captured_compiled(self, graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> Any:
        """Captures the step, compiled if that is possible, and returns its result."""
        assert self._stream is not None
        compiled = self.compiler.ready(step)
        try:
            return capture(graph, compiled, self._pool, self._stream)
        except NotCapturableError as error:
            if compiled is not step:
                self.compiler.give_up(str(error))
            raise
