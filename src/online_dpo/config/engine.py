"""The field of the configuration that names the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from online_dpo.config.field_specs import documented

EngineName = Literal["transformers", "vllm_colocate", "vllm_server"]

OF_VLLM: dict[str, Literal["colocate", "server"]] = {"vllm_colocate": "colocate", "vllm_server": "server"}
"""Engines of vLLM, and the ``vllm_mode`` that each of them is."""


@documented
@dataclass
class EngineFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- sampling -----------------------------------------------------------------------------------------------------

    engine: EngineName | None = None
    """What samples completions: `transformers` (the policy itself), `vllm_colocate`, `vllm_server`, or one that a
    plugin registers. When not set, `use_vllm` and `vllm_mode` choose it.
    """


def settle_engine(args: Any) -> None:
    """Make `engine`, `use_vllm` and `vllm_mode` say the same.

    Raises:
        ValueError: they contradict each other.
    """
    mode = OF_VLLM.get(args.engine or "")
    default = type(args).vllm_mode
    if mode is not None:
        if args.vllm_mode not in (default, mode):
            raise ValueError(
                f"`engine={args.engine!r}` contradicts `vllm_mode={args.vllm_mode!r}`; leave one of them out."
            )
        args.use_vllm, args.vllm_mode = True, mode
    elif args.engine is not None and args.use_vllm:
        raise ValueError(f"`engine={args.engine!r}` contradicts `use_vllm`; leave one of them out.")


def engine_name(engine: str | None, use_vllm: bool, vllm_mode: str) -> str:
    """The name of the engine that these fields choose."""
    if engine is not None:
        return engine
    return f"vllm_{vllm_mode}" if use_vllm else "transformers"
