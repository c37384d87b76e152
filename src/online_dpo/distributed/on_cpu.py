"""Sharding on CPUs, to try a run of many GPUs with a small model on any machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Inside, an `Accelerator` that is made for processes on CPUs takes a plugin of FSDP as it does on GPUs.

    FSDP2 itself works on CPUs. Accelerate leaves them out of the list of devices for which it reads the plugin.
    """
    init = AcceleratorState.__init__

    @functools.wraps(init)
    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        known = AcceleratorState._shared_state != {}
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if not known and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", with_plugin):
        yield


def join_deepspeed_on_cpu() -> None:
    """Has DeepSpeed know the process group of processes on CPUs, which transformers does on GPUs alone: a script may
    load a model before there is an `Accelerator`, and ZeRO-3 partitions it then.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # its collectives in shared memory would be compiled first, for minutes; gloo's do as well
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed("gloo", verbose=False)
