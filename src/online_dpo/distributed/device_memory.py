"""Memory of this process's device: what is free, and what is kept to save time and can be given back.

Several parts keep memory between their calls: the built-in engine its key/value cache, its copies of weights and its
graphs, for instance. Each says so with `Kept`. Whoever runs out of memory, or needs much of it, calls
`free_kept_memory`; the parts make theirs again at their next call.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import psutil
import torch

_all_kept: WeakSet[Kept] = WeakSet()
_lock = threading.Lock()

whole_device = threading.RLock()
"""Held by a thread while it does what concerns a GPU as a whole: capturing a CUDA graph, compiling kernels (which are
timed, for which the device is waited for) and emptying the allocator's cache. A capture fails where another thread does
one of the others, and they fail during a capture; reward models compute in threads beside sampling.
"""


class Kept:
    """Memory that its owner keeps between calls and makes again where it is gone. It is known as long as the owner
    holds this object.

    >>> self._kept = Kept(self._buffers.release)
    >>> with self._kept.in_use(): ...  # nobody frees it here

    Args:
        release: frees it. Must not refer to this object.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release, self._users, self._lock = release, 0, threading.Lock()
        with _lock:
            _all_kept.add(self)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, `give_back` does nothing."""
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1

    def give_back(self) -> None:
        """Frees the memory, unless it is in use."""
        with self._lock:  # so that no use begins meanwhile
            if self._users == 0:
                self._release()


def free_kept_memory() -> None:
    """Frees what any part of this process keeps and does not use at the moment, and returns it to the device."""
    with _lock:
        all_kept = list(_all_kept)
    for kept in all_kept:
        kept.give_back()
    empty_device_cache()


def empty_device_cache() -> None:
    """Returns memory that the allocator caches without using it to the device."""
    gc.collect()
    if torch.cuda.is_available():
        with whole_device:
            torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can be had on a device: free ones, and those that torch holds without using them."""
    if device.type != "cuda":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
