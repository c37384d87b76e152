"""Train a language model on preferences collected while it trains.

``from online_dpo import OnlineDPOConfig, OnlineDPOTrainer``. Importing the package itself loads neither torch nor
transformers, so that the command line can check its arguments first; its classes are loaded when asked for.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.cli.terminal.progress import ProgressDisplay
    from online_dpo.config.trainer_config import OnlineDPOConfig
    from online_dpo.training.trainer import OnlineDPOTrainer

__version__ = "0.1.0"

__all__ = ["OnlineDPOConfig", "OnlineDPOTrainer", "ProgressDisplay", "__version__"]

_HOMES = {
    "OnlineDPOConfig": "online_dpo.config.trainer_config",
    "OnlineDPOTrainer": "online_dpo.training.trainer",
    "ProgressDisplay": "online_dpo.cli.terminal.progress",
}


def _is_of_use(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# PEFT, and with it transformers' Trainer, imports bitsandbytes where it is installed, which then misses a kernel for
# CPUs in every run. Gradients do not go through that kernel, so no run uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'online_dpo' has no attribute {name!r}")
    from online_dpo.versions import warn_once

    warn_once()  # before the import, which an untested version may break
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
