"""FSDP2 through accelerate: each rank holds a slice of every parameter, its gradient and its optimizer state.

What is private in torch is used in this file alone: `FSDPModule._get_fsdp_state` and the groups of its state, and where
a slice lies in its parameter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from online_dpo.distributed.updated import Updated, updated_parameters
from online_dpo.distributed.weights import full


class FSDP2Sharding:
    """Shards the policy, its gradient and its optimizer with FSDP2, as accelerate prepares it."""

    name = "fsdp2"
    partial = splits_state = True
    copies = False

    def __init__(self, accelerator: Accelerator, check: Callable[[], None]) -> None:
        self._accelerator, self._check = accelerator, check
        self._frozen: list[nn.Module] = []
        plugin: Any = accelerator.state.fsdp_plugin
        if (half := plugin.mixed_precision_policy) is not None:
            # accelerate's own also rounds outputs and reduced gradients, and so log-probabilities to three digits
            plugin.mixed_precision_policy = MixedPrecisionPolicy(half.param_dtype, reduce_dtype=torch.float32)

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Returns the optimizer as it is: accelerate has given it the slices."""
        check_operations(model, self._check)
        return optimizer

    @contextmanager
    def one_pass(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Inside, ranks reduce gradients in the ``last`` pass alone; before it they add up unreduced."""
        root: Any = model
        root.set_requires_gradient_sync(last and self._accelerator.gradient_state.sync_gradients)
        yield

    def drop_gradients(self, model: nn.Module) -> None:
        """Sets all gradients to ``None``."""
        for parameter in model.parameters():
            parameter.grad = None

    def abandon_pass(self, model: nn.Module) -> None:
        """Puts the policy and frozen models back to slices, and drops gradients that were or were not reduced yet."""
        for abandoned in (model, *self._frozen):
            abandon(abandoned)
        self.drop_gradients(model)

    def shard_frozen(self, model: nn.Module) -> None:
        """Shards a frozen model layer by layer, as accelerate shards the policy. It may be of another architecture."""
        accelerator = self._accelerator
        plugin: Any = copy.copy(
            accelerator.state.fsdp_plugin
        )  # it remembers the layers of the first model that it sees
        plugin.cpu_ram_efficient_loading = False  # each rank has loaded the model whole
        classes = plugin.transformer_cls_names_to_wrap
        if classes is not None and any(get_module_class_from_name(model, name) is None for name in classes):
            plugin.transformer_cls_names_to_wrap = None  # the model's own
        as_for_policy: Any = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=accelerator.mixed_precision,
            is_main_process=accelerator.is_main_process,
            torch_device_mesh=accelerator.torch_device_mesh,
            parallelism_config=accelerator.parallelism_config,
            device=accelerator.device,
        )
        fsdp2_prepare_model(as_for_policy, model)
        check_operations(model, self._check)
        self._frozen.append(model)

    def updated(self, model: nn.Module, optimizer: Any) -> Updated:
        """Returns the slices of the model's parameters."""
        return updated_parameters(model, optimizer, _place)

    def take_written(self) -> None:
        """Does nothing: the optimizer updates the slices themselves."""

    def full_trained(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the whole parameter; a collective operation."""
        return full(parameter)


def _place(parameter: Any) -> tuple[int, int]:
    """Where this rank's slice of a parameter begins, and how many numbers it has: rows that follow each other."""
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    numel = math.prod(shape)
    assert numel == 0 or tuple(shape[1:]) == tuple(parameter.shape[1:]), "FSDP2 shards the first dimension"
    return (offsets[0] * math.prod(parameter.shape[1:]) if numel else 0), numel


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a model and may call it alone."""
    modules = _fsdp_modules(model)
    root: Any = modules[0]
    root._get_fsdp_state()._lazy_init()  # the first forward pass of a rank would do it, and choose another root
    groups = _groups(modules)
    after_forward = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # a forward pass leaves its weights whole
    try:
        for group in groups:
            group.unshard()
            group.wait_for_unshard()
        yield
    finally:
        for group, mesh in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = mesh
            group.reshard()


def reshard(model: nn.Module) -> None:
    """Frees all but this rank's slices: a forward pass without gradients leaves the last layers whole."""
    for group in _groups(_fsdp_modules(model)):
        group.reshard()


class _Checked:
    """An all-gather or reduce-scatter of FSDP2 that calls ``check`` first; its memory is allocated before that."""

    def __init__(self, operation: Any, check: Callable[[], None]) -> None:
        self.operation, self._check = operation, check

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.operation.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return self.operation(*args, **kwargs)


def check_operations(model: nn.Module, check: Callable[[], None]) -> None:
    """Calls ``check`` before every collective operation of a model's passes. HSDP's all-reduce follows a reduce-scatter
    at once, and shares its check.
    """
    for group in _groups(_fsdp_modules(model)):
        if not isinstance(group._all_gather_comm, _Checked):
            group._all_gather_comm = _Checked(group._all_gather_comm, check)
            group._reduce_scatter_comm = _Checked(group._reduce_scatter_comm, check)


def abandon(model: nn.Module) -> None:
    """Makes a model ready for its next pass after one that ended in the middle: operations that have begun are awaited,
    weights are slices again, gradients that were not reduced yet are dropped.
    """
    modules = _fsdp_modules(model)
    root: Any = modules[0]
    root._get_fsdp_state()._lazy_init()  # memory may have run out before the first pass
    for group in _groups(modules):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # made by the first all-gather
                parameter._unsharded_param.grad = None
    root.reset_iter_state()


def slice_of(parameter: DTensor, whole: torch.Tensor) -> torch.Tensor:
    """Returns the slice of a whole tensor that this rank holds of a parameter. Each rank gives the same tensor."""
    mesh = parameter.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()


def joined(parameter: DTensor, own: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor of the slices that the ranks hold as they hold a parameter; a collective operation."""
    mesh, placed = parameter.device_mesh, parameter.placements
    own = own.to(mesh.device_type)  # it may be offloaded to the host, of which NCCL knows nothing
    sizes = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(own, mesh, placed, run_check=False, **sizes).full_tensor()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(modules: list[FSDPModule]) -> list[Any]:
    """The groups of parameters that are gathered together, each once."""
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    return list(dict.fromkeys(groups))
