"""`PassSize`: the most tokens of a pass where the configuration leaves it open, from the memory that is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import from_every_rank, is_first_rank, world_size
from online_dpo.distributed.device_memory import free_memory
from online_dpo.distributed.sharding import Sharding
from online_dpo.distributed.weights import part, shape_of
from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.memory import WHAT_TO_LOWER
from online_dpo.packing.microbatches import token_count
from online_dpo.runs import events
from online_dpo.sizing.plan import ENGINES_OF_DEEPSPEED, Plan
from online_dpo.sizing.shape import KNOWN
from online_dpo.sizing.tokens import pass_bytes, shape_like, tokens_that_fit
from online_dpo.types import PackedRows

logger = logging.getLogger(__name__)

GIB = 2**30
OF_CONFIGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Fields under the names that every config of transformers answers to."""
STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 4, "lion": 4, "rmsprop": 4}
"""Bytes of an optimizer's state for each number that it trains, by a part of its class's name; others have Adam's."""
OF_ADAM = 8


@dataclass(frozen=True)
class Chosen:
    """What a rank can have in a pass: tokens without padding, the bytes that they are estimated to take, and those that
    are free for them.
    """

    tokens: int
    bytes: int
    free: int


class PassSize:
    """The most tokens of a pass: ``max_tokens_per_pass``, or what suits the device.

    On a GPU that is settled once, before the first pass with pairs, when models, optimizer and sampler hold their
    memory: as many tokens as are estimated to fit on the rank with the least room, up to the configuration's default. A
    checkpoint keeps the number, and a run that is resumed takes it again where it fits: other passes give the same
    gradient but for rounding.

    Args:
        args: the run's configuration.
        sharding: how the policy's weights lie on the ranks.
        optimizer: returns the optimizer.
        device: where passes are computed.
        free: returns the bytes that can be had on a device.
    """

    FILE = "passes.json"

    def __init__(
        self,
        args: OnlineDPOConfig,
        sharding: Sharding,
        optimizer: Callable[[], Any],
        device: torch.device,
        free: Callable[[torch.device], int] = free_memory,
    ) -> None:
        self.args, self._sharding, self._optimizer = args, sharding, optimizer
        self._device, self._free = device, free
        self.fills_rows = False  # with FlexAttention, where hidden blocks cost nothing
        self._chosen: Chosen | None = None
        self._saved: Chosen | None = None

    @property
    def tokens(self) -> int:
        """The most tokens of a pass, each prompt counted once and padding not at all."""
        return self.args.tokens_per_pass if self._chosen is None else self._chosen.tokens

    @property
    def row_capacity(self) -> int:
        """Tokens that rows which share prompts are filled up to; 0 is the largest prompt with its completions."""
        return self.tokens if self.fills_rows else 0

    @property
    def is_open(self) -> bool:
        """Whether the number has yet to be settled."""
        return self._chosen is None and self.args.max_tokens_per_pass is None and self._device.type == "cuda"

    def settle(self, model: nn.Module, rows: PackedRows) -> None:
        """Chooses the number, if it is open and any rank has pairs. A collective operation.

        Args:
            model: the policy.
            rows: some of the step's, for the length of rows and their padding; those of a rank without pairs tell none.
        """
        if not self.is_open:
            return
        lengths = [lengths for lengths in from_every_rank(_lengths(rows)) if lengths is not None]
        if not lengths:
            return  # there is no pass before there is a pair
        width, padding = map(max, zip(*lengths, strict=True))
        self._chosen = min(from_every_rank(self._that_fit(model, width, padding)), key=lambda chosen: chosen.tokens)
        if is_first_rank():
            _tell(self._chosen)

    def _that_fit(self, model: nn.Module, width: int, padding: float) -> Chosen:
        free = self._free(self._device) - still_to_come(model, self._optimizer(), self._sharding.name)
        plan, most = self._plan(model), self.args.tokens_per_pass
        tokens = tokens_that_fit(plan, free, width, padding, most)

        def size(tokens: int) -> int:
            return pass_bytes(replace(plan, tokens_per_pass=int(padding * tokens)), width)

        if self._saved is not None and size(self._saved.tokens) <= free:
            tokens = self._saved.tokens
        return Chosen(tokens, size(tokens), max(0, free))

    def _plan(self, model: nn.Module) -> Plan:
        parameters = list(model.parameters())
        numbers = sum(shape_of(parameter).numel() for parameter in parameters)
        half = self.args.bf16 or self.args.fp16 or parameters[0].dtype.itemsize == 2
        name = self._sharding.name
        return Plan(
            shape_like(fields_of(model), numbers),
            name if name in ("fsdp2", *ENGINES_OF_DEEPSPEED) else "none",  # pyright: ignore[reportArgumentType]
            world_size(),
            bf16=bool(half),
            adapter="none" if all(parameter.requires_grad for parameter in parameters) else "lora",
            gradient_checkpointing=bool(self.args.gradient_checkpointing),
        )

    def files(self, rank: int) -> Sequence[str]:
        """Returns no name: a checkpoint of an earlier version, without the file, has passes of another size only."""
        return []

    def save(self, folder: Path, rank: int) -> None:
        """Writes the number on rank 0, where it was chosen here."""
        known = self._chosen or self._saved
        if rank == 0 and known is not None:
            write_json(folder / self.FILE, known)

    def restore(self, folder: Path, rank: int) -> None:
        """Takes the number that `save` wrote, where it fits.

        Raises:
            CheckpointError: the file is damaged.
        """
        if (folder / self.FILE).is_file():
            self._saved, self._chosen = read_json(folder / self.FILE, Chosen), None


def _lengths(rows: PackedRows) -> tuple[int, float] | None:
    """Returns the tokens of a row, and how many there are with padding for each without; ``None`` without pairs."""
    if not rows.pairs:
        return None
    tokens = rows.tokens.ids_RT
    return tokens.shape[1], tokens.numel() / token_count(rows.pairs)


def _tell(chosen: Chosen) -> None:
    text = (
        f"A pass has up to {chosen.tokens} tokens, which take about {chosen.bytes / GIB:.1f} GiB of the "
        f"{chosen.free / GIB:.1f} GiB that are free. `max_tokens_per_pass` sets another number."
    )
    facts = {"tokens": chosen.tokens, "bytes": chosen.bytes, "free": chosen.free}
    if chosen.bytes <= chosen.free:
        logger.info("%s", text)
        events.emit("passes", text, **facts)
    else:
        events.warn(logger, "passes", f"{text} That may not be enough for one group: {WHAT_TO_LOWER}", **facts)


def fields_of(model: nn.Module) -> dict[str, Any]:
    """Returns what `shape_like` reads of a model: its config's values, and what these lack from its modules."""
    base: Any = unwrapped(model)
    config = base.config.get_text_config()
    if config.model_type in KNOWN:
        return config.to_dict()
    vocabulary, width = shape_of(base.get_input_embeddings().weight)
    lists = [len(module) for module in base.modules() if isinstance(module, nn.ModuleList)]
    found = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": max(lists, default=1)}
    given = {name: getattr(config, name, None) for name in OF_CONFIGS}  # not every kind of model has heads
    known = {name: value for name, value in given.items() if value is not None}
    return {**found, **known, "model_type": config.model_type, "tie_word_embeddings": config.tie_word_embeddings}


def still_to_come(model: nn.Module, optimizer: Any, sharding: str) -> int:
    """Returns the bytes that will be held beside passes, and are not yet: gradients, and before its first step the
    state of an optimizer, which DeepSpeed makes at the start.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(part(parameter).nbytes for parameter in trained if parameter.grad is None)
    if sharding in ENGINES_OF_DEEPSPEED:
        return gradients
    without = [parameter for parameter in trained if parameter not in optimizer.state]
    return gradients + _state_bytes(optimizer) * sum(part(parameter).numel() for parameter in without)


def _state_bytes(optimizer: Any) -> int:
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()  # accelerate's wrapper has it inside
    return next((size for named, size in STATE_BYTES.items() if named in name), OF_ADAM)
