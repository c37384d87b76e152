"""Loading models with several processes: whole, on every rank.

Libraries shard or leave out weights while a model is loaded, if they know that the run is sharded; silently, and for
every model that is loaded meanwhile, reward models too. Here all are loaded whole and sharded afterwards, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed

from online_dpo.distributed.process_state import environment


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives every rank the whole weights, also while FSDP or ZeRO-3 is configured."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
