"""The tables of docs/guides/several-gpus.md, from the formula.

python -m online_dpo.sizing.page docs/guides/several-gpus.md     writes them anew between their marks
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from online_dpo.sizing.needs import memory_needs
from online_dpo.sizing.passing import kv_bytes
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS, ModelShape

BEGIN, END = "<!-- {name}: python -m online_dpo.sizing.page docs/guides/several-gpus.md -->", "<!-- end of {name} -->"
GIB = 2**30
GPUS = (1, 8, 16)
MODES: dict[str, dict[str, Any]] = {
    "all weights, DDP": {},
    "all weights, ZeRO-1": {"sharding": "zero1"},
    "all weights, ZeRO-2": {"sharding": "zero2"},
    "all weights, ZeRO-2, Adam's state offloaded": {"sharding": "zero2", "offload_optimizer": True},
    "all weights, ZeRO-3": {"sharding": "zero3"},
    "all weights, ZeRO-3, all offloaded": {
        "sharding": "zero3",
        "offload_optimizer": True,
        "offload_parameters": True,
    },
    "all weights, FSDP2": {"sharding": "fsdp2"},
    "LoRA, DDP": {"adapter": "lora"},
    "LoRA, FSDP2": {"adapter": "lora", "sharding": "fsdp2"},
    "LoRA, ZeRO-3": {"adapter": "lora", "sharding": "zero3"},
    "QLoRA, DDP": {"adapter": "qlora"},
    "QLoRA, FSDP2, stored as bf16": {"adapter": "qlora", "sharding": "fsdp2", "packed_as_floats": True},
    "QLoRA, ZeRO-3": {"adapter": "qlora", "sharding": "zero3"},
}


def training_table() -> str:
    """Returns the table of what training needs while servers sample."""
    lines = [
        "| policy | mode | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS) + " |",
        "|---|---|" + "---:|" * len(GPUS),
    ]
    for name, shape in MODELS.items():
        for mode, options in MODES.items():
            cells = [_cell(shape, gpus, options) for gpus in GPUS]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sampling_table() -> str:
    """Returns the table of what sampling on the trainer's own GPUs adds."""
    lines = [
        "| policy | whole weights in bf16 | keys and values of 64 completions |",
        "|---|---:|---:|",
    ]
    for name, shape in MODELS.items():
        plan = Plan(shape, "fsdp2", gpus=8)
        lines.append(f"| {name} | {_gib(2 * shape.parameters)} | {_gib(kv_bytes(plan))} |")
    return "\n".join(lines)


TABLES = {"training": training_table, "sampling": sampling_table}


def with_tables(page: str) -> str:
    """Returns the page with its tables written anew."""
    for name, table in TABLES.items():
        before, rest = page.split(BEGIN.format(name=name))
        _, after = rest.split(END.format(name=name))
        page = f"{before}{BEGIN.format(name=name)}\n\n{table()}\n\n{END.format(name=name)}{after}"
    return page


def _cell(shape: ModelShape, gpus: int, options: dict[str, Any]) -> str:
    offloads = options.get("offload_optimizer", False)
    if gpus == 1 and "sharding" in options and not offloads:
        return ""
    needs = memory_needs(Plan(shape, gpus=gpus, engine="servers", **options))
    return _gib(needs.gpu) + (f" + {_gib(needs.host)}" if offloads else "")


def _gib(size: int) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib < 10 else f"{gib:.0f}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
