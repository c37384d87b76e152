"""Calling a sharded model from ranks that need it for different numbers of steps, as sampling does.

Each forward pass of a sharded model gathers weights from all ranks. So a rank that has finished its completions must
not leave the others waiting. Either every rank holds the whole weights for a while; or, where these do not fit, those
that have finished make passes with one token for as long as another needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from online_dpo.distributed.collectives import any_rank, is_first_rank, max_over_ranks
from online_dpo.distributed.device_memory import free_kept_memory, free_memory
from online_dpo.distributed.weights import gathered, holds_all, is_sharded, shape_of
from online_dpo.errors import WholeModelDoesNotFit

logger = logging.getLogger(__name__)

ROOM = 1.25
"""Free memory that whole weights may take, as a multiple of their size: completions need a cache beside them."""

_layer_by_layer: WeakSet[nn.Module] = WeakSet()


@contextmanager
def callable_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a rank may call a model without gradients as often as it needs. A collective operation if it is sharded.

    Where the whole weights do not fit into the memory of every rank, they are gathered layer by layer in each pass.
    """
    if holds_all(model):
        yield
    elif not any_rank(not fits_whole(model, device), device):
        with gathered(model):
            yield
    else:
        _tell_once(model)
        with _Together(model, device):
            yield


@contextmanager
def whole_on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole weights of a model on its device; afterwards they are where they were. Before
    training begins, a policy that will be sharded is in host memory. A collective operation.

    Raises:
        WholeModelDoesNotFit: on every rank, if they do not fit on any.
    """
    parked = next(model.parameters()).device
    moves = not is_sharded(model) and parked != device
    if any_rank((moves or not holds_all(model)) and not fits_whole(model, device), device):
        raise WholeModelDoesNotFit(
            "An evaluation needs the whole policy in the memory of every process, where it does not fit beside what is "
            "there. Use GPUs with more memory, train without evaluations (`eval_strategy: no`), and evaluate the saved "
            "model with `online-dpo eval`."
        )
    if moves:
        model.to(device)
    try:
        with gathered(model):
            yield
    finally:
        if moves:
            model.to(parked)


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Returns whether this rank has room for the whole weights of a sharded model."""
    needed = ROOM * sum(shape_of(p).numel() * p.element_size() for p in model.parameters())
    if needed >= free_memory(device):
        free_kept_memory()
    return needed < free_memory(device)


class _Together:
    """Has all ranks make the forward passes of a model together, until none needs another."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device

    def __enter__(self) -> None:
        self._hook = self._model.register_forward_pre_hook(self._announce, prepend=True)

    def __exit__(self, *exception: Any) -> None:
        """Makes passes with one token as long as another rank makes its own."""
        self._hook.remove()
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        while self._another_needs_it(False):
            self._model(input_ids=token_11, use_cache=False)

    def _announce(self, module: nn.Module, args: Any) -> None:
        self._another_needs_it(True)

    def _another_needs_it(self, own: bool) -> bool:
        return bool(max_over_ranks(torch.tensor(int(own), device=self._device)))


def _tell_once(model: nn.Module) -> None:
    if model not in _layer_by_layer and is_first_rank():
        logger.warning(
            "The whole weights do not fit beside what a process holds: completions are sampled with weights that are "
            "gathered layer by layer, for each token, which is slow. More processes, `use_vllm` with servers, or a "
            "smaller model avoid it."
        )
    _layer_by_layer.add(model)
