"""What a run may be told: the configuration, its groups of fields and their checks. Knows no stage.

Importing it loads neither torch nor transformers: `OnlineDPOConfig` is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

__all__ = ["OnlineDPOConfig"]


def __getattr__(name: str) -> Any:
    if name != "OnlineDPOConfig":
        raise AttributeError(f"module 'online_dpo.config' has no attribute {name!r}")
    from online_dpo.config.trainer_config import OnlineDPOConfig

    return OnlineDPOConfig


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
