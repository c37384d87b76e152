"""A process that acts for all processes of a run, once others are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from online_dpo.distributed.collectives import without_others

ONLY_ONE = {
    "process_index": 0,
    "local_process_index": 0,
    "num_processes": 1,
    "distributed_type": DistributedType.NO,
}
"""What accelerate, and transformers through it, read to learn which of how many processes this is."""


@contextmanager
def only_process() -> Iterator[None]:
    """Inside, this process is the first and only one, for collective operations of ours and for what transformers
    decides by rank: who writes files, and whether to wait for others.
    """
    shared = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [{name: state[name] for name in ONLY_ONE} for state in shared]
    try:
        for state in shared:
            state.update(ONLY_ONE)
        with without_others():
            yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.update(values)
