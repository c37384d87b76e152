"""DeepSpeed ZeRO-1, 2 and 3: each rank holds a part of the optimizer's state (1), of the gradient as well (2), and of
the weights as well (3).

What is private in DeepSpeed 0.19 is used in this file alone; a test looks whether all of it exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from online_dpo.distributed.updated import Span, Updated
from online_dpo.distributed.weights import full, shape_of

WEIGHTS = 3
"""The stage in which weights are partitioned."""


class ZeROSharding:
    """Shards the policy with DeepSpeed. Its engine steps when `optimizer.step()` is called and not in the backward
    pass, so that a step that is not finite can be skipped before anything has changed.
    """

    copies = splits_state = True

    def __init__(self, accelerator: Accelerator, check: Callable[[], None]) -> None:
        plugin: Any = accelerator.state.deepspeed_plugin
        self._accelerator, self._plugin, self._check = accelerator, plugin, check
        self._frozen: list[nn.Module] = []
        self._depth = 0
        self.name = f"zero{plugin.zero_stage}"
        self.partial = plugin.zero_stage == WEIGHTS
        self._engine: Any = None
        self._dropped = False
        if accelerator.device.type == "cpu":
            # its collectives in shared memory would be compiled first, for minutes; gloo's do as well
            deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Takes the engine; returns the optimizer that steps it."""
        engine: Any = model
        self._engine, self._dropped = engine, False
        check_operations(self._check)
        if self.partial:
            _offloads[engine.module] = engine.optimizer.parameter_offload
        self._accelerator.deepspeed_engine_wrapped = _Backward(model)  # pyright: ignore[reportAttributeAccessIssue]
        return _SteppingOptimizer(optimizer, self._step)

    @contextmanager
    def one_pass(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Inside, the ``last`` pass is the one after which the engine steps. It has to know before the forward pass."""
        boundary = last and self._accelerator.gradient_state.sync_gradients
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._depth = len(parameter_offload.FWD_MODULE_STACK)
        yield

    def drop_gradients(self, model: nn.Module) -> None:
        """Removes the gradients that ZeRO has reduced and keeps itself, and those of the parameters."""
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.micro_step_id = 0
            if optimizer.offload_optimizer:
                optimizer.reset_cpu_buffers()
            else:
                optimizer.averaged_gradients = {}
        else:
            optimizer.micro_step_id = -1
            optimizer._release_preflattened_grad_buffers()
            for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                for group in gradients:
                    gradients[group] = None
            if optimizer.cpu_offload:
                optimizer.reset_cpu_buffers()
        self._engine.zero_grad()
        self._dropped = True

    def abandon_pass(self, model: nn.Module) -> None:
        """Puts back what DeepSpeed keeps from a pass that ended in the middle, and removes the step's gradients."""
        optimizer = self._engine.optimizer
        state = optimizer._backward_hook_state
        state.backward_active_depth = state.remaining_grad_acc_hooks = 0
        optimizer.clear_backward_seen_flag()
        in_parts = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params() if in_parts else bucket.clear()
        reduced = optimizer.params_already_reduced
        for key in reduced if in_parts else range(len(reduced)):
            reduced[key] = False
        if not in_parts:
            optimizer._clear_previous_reduced_grads()
            optimizer._release_ipg_buffers()
        for parameter in model.parameters():
            parameter.grad = None  # ZeRO-3 expects here that it has taken them all
        self.drop_gradients(model)
        self._dropped = False
        del parameter_offload.FWD_MODULE_STACK[self._depth :]
        for module in (self._engine.module, *self._frozen) if in_parts else ():
            abandon(_offloads[module])

    def shard_frozen(self, model: nn.Module) -> None:
        """Casts a frozen model's weights to the type that DeepSpeed casts the policy's to (not its buffers), and
        partitions them if those of the policy are.
        """
        config = self._plugin.deepspeed_config
        for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if config.get(kind, {}).get("enabled") is True:
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(dtype)
        if self.partial:
            partition(model, config)
            self._frozen.append(model)

    def updated(self, model: nn.Module, optimizer: Any) -> Updated:
        """Returns the copies in fp32 of this rank's part, of many parameters in each tensor."""
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if self.partial:
            if zero.swap_optimizer:
                raise ValueError("What DeepSpeed has offloaded to NVMe cannot be saved; offload it to the CPU.")
            groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            tensors = [(flat, _spans_of_weights(names, group)) for flat, group in groups]
        else:
            groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
            tensors = [(flat, _spans_of_copies(names, group)) for flat, group in groups]
        return Updated(zero.optimizer, tensors, vars(zero.loss_scaler))

    def take_written(self) -> None:
        """Rounds the copies to the model's weights, as after a step; a collective operation."""
        zero = self._engine.optimizer
        if not self.partial:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def full_trained(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the whole parameter in fp32 if it is trained, else as the model has it; a collective operation."""
        zero = self._engine.optimizer
        trained = {id(p) for group in (zero.fp16_groups if self.partial else zero.bit16_groups) for p in group}
        if id(parameter) not in trained:
            return full(parameter)
        whole = safe_get_full_fp32_param(parameter)
        assert whole is not None  # it is trained
        return whole.view(shape_of(parameter))

    def _step(self) -> None:
        """Updates the weights, unless the gradients were dropped; the schedule goes on in both cases."""
        dropped, self._dropped = self._dropped, False
        if not dropped:
            self._engine.step()
            return
        self._engine.optimizer.overflow = False  # of this step; it may be set from an earlier one
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.step()


OPERATIONS = ("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce", "all_reduce_coalesced")
OPERATIONS += ("all_to_all", "all_to_all_single", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor")
"""The collective operations of DeepSpeed's backend."""


class _CheckedBackend:
    """DeepSpeed's backend, with a check before each collective operation."""

    def __init__(self, backend: Any, check: Callable[[], None]) -> None:
        self.backend, self._check = backend, check

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.backend, name)
        if name not in OPERATIONS:
            return operation

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check()
            return operation(*args, **kwargs)

        return checked


def check_operations(check: Callable[[], None]) -> None:
    """Calls ``check`` before every collective operation of DeepSpeed."""
    backend: Any = comm.cdb
    comm.cdb = _CheckedBackend(backend.backend if isinstance(backend, _CheckedBackend) else backend, check)


def abandon(offload: Any) -> None:
    """Partitions all weights of a model again after a pass that ended in the middle, and forgets its order of layers:
    the ranks may have recorded it to different places.
    """
    coordinator = offload.get_param_coordinator()
    prefix = f"_{type(coordinator).__name__}__"
    in_flight = getattr(coordinator, f"{prefix}inflight_param_registry")
    for parameter in offload.module.parameters():
        # its operation had been prepared, and was not begun
        if parameter.ds_status == ZeroParamStatus.INFLIGHT and parameter not in in_flight:
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
            parameter.data = parameter.data.new_empty(0)
    coordinator.release_and_reset_all(offload.module)
    getattr(coordinator, f"{prefix}active_backward_submodules").clear()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    for module in offload.module.modules():
        module._parameters._in_forward = False  # while it is true, looking at a weight gathers it
        for count in ("ds_grads_remaining", "applied_pre_backward_ref_cnt"):
            if count in vars(module):
                setattr(module, count, 0)


def _spans_of_weights(names: Mapping[int, str], group: Iterable[Any]) -> list[Span]:
    """What ZeRO-3 has in a tensor: this rank's parts of parameters; the last part of each is filled up with zeros."""
    spans, offset = [], 0
    for parameter in group:
        size = parameter.ds_tensor.ds_numel
        start = dist.get_rank(parameter.ds_process_group) * size
        numel = max(0, min(size, parameter.ds_numel - start))
        spans.append(Span(names[id(parameter)], start if numel else 0, offset, numel))
        offset += size
    return spans


def _spans_of_copies(names: Mapping[int, str], group: Iterable[Any]) -> list[Span]:
    """What ZeRO-1 and 2 have in a tensor: an equal share of all parameters as one row."""
    placed = ((names[id(parameter)], parameter._hp_mapping) for parameter in group)
    return [
        Span(name, at.lp_fragment_address.start, at.hp_fragment_address.start, at.lp_fragment_address.numel)
        for name, at in placed
        if at is not None
    ]


class _Backward:
    """Accelerate's wrapper of an engine, except that the backward pass makes no step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Adds the gradient of a loss; ranks reduce it at the boundary that `ZeROSharding.one_pass` has set."""
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """Returns the norm of the whole gradient before the step; nan if it is not finite. A collective operation."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        else:
            norm = optimizer.scaled_global_norm()
        norm = float(norm)
        return float("nan") if norm == -1 else norm / optimizer.loss_scale  # -1 stands for nan and infinities


class _SteppingOptimizer(DeepSpeedOptimizerWrapper):
    """Accelerate's wrapper of DeepSpeed's optimizer, whose `step` does step."""

    def __init__(self, prepared: Any, step: Callable[[], None]) -> None:
        super().__init__(prepared.optimizer)
        self._prepared, self._step = prepared, step

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the weights."""
        self._prepared.step()  # does nothing, but the schedule was made for it, and looks whether it was called
        self._step()


_offloads: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""What gathers and frees the weights of each partitioned model, layer by layer."""

OF_FROZEN = ("stage", "offload_param", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
OF_FROZEN += ("stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size")
"""Settings of ZeRO that a model without gradients has."""


def partition(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Partitions the weights of a whole frozen model over the ranks.

    Args:
        config: DeepSpeed's configuration of the policy. What it leaves to be filled in has DeepSpeed's own default.
    """
    zero = {name: value for name, value in config["zero_optimization"].items() if name in OF_FROZEN and value != "auto"}
    types = {kind: config[kind] for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled") is True}
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(
        model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **types}
    )
    model.eval()
    _offloads[model] = engine.optimizer


def make_whole(model: nn.Module) -> None:
    """Gives a model that was loaded in parts the whole weights, in host memory: `deepspeed.initialize` partitions them
    again. A collective operation.
    """
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in whole:
                loaded: Any = parameter
                values = joined(loaded, loaded.ds_tensor.data) if hasattr(loaded, "ds_id") else loaded.data
                whole[id(parameter)] = nn.Parameter(values.cpu(), parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]


def slice_of(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """Returns the part of a whole tensor that this rank holds of a parameter; the last one is filled up with zeros."""
    size = parameter.ds_tensor.numel()
    rank = dist.get_rank(parameter.ds_process_group)
    own = whole.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(own, (0, size - own.numel())).view(parameter.ds_tensor.shape)


def joined(parameter: Any, own: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor of the parts that the ranks hold as they hold a parameter; a collective operation."""
    group = parameter.ds_process_group
    accelerator: Any = get_accelerator()
    own = own.to(accelerator.current_device_name()).contiguous()  # it may be offloaded to the host
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group)
    return torch.cat([p.flatten() for p in parts])[: parameter.ds_numel].view(parameter.ds_shape)


@contextmanager
def unpartitioned(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a model and may call it alone.

    DeepSpeed's hooks, which gather and free weights layer by layer, are away meanwhile; and the order in which layers
    ran, which it compares over ranks, is forgotten.
    """
    with deepspeed.zero.GatheredParameters(list(model.parameters())), _without_hooks(_offloads[model]):
        yield


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    for hook in (*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()
        parameter_offload.FWD_MODULE_STACK.pop()  # it has the model already
