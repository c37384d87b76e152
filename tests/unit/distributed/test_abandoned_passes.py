"""What is private in torch and DeepSpeed, and put back after a pass that ended in the middle, exists as it is named."""

import inspect

import pytest
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.nn.parallel import DistributedDataParallel


def names_in(kind):
    return inspect.getsource(kind)


@pytest.mark.parametrize("name", ["_comm_hooks", "_sync_buffers", "_reset_state", "require_forward_param_sync"])
def test_of_ddp(name):
    assert name in names_in(DistributedDataParallel)


def test_of_fsdp2():
    assert callable(FSDPModule.reset_iter_state)
    assert "self._all_gather_comm" in (group := names_in(_fsdp_param_group)) and "self._reduce_scatter_comm" in group
    assert "unsharded_accumulated_grad" in (param := names_in(_fsdp_param)) and "self._unsharded_param" in param


def test_of_deepspeed():
    from deepspeed.comm import comm
    from deepspeed.runtime import base_optimizer
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator, stage3, stage_1_and_2

    assert "cdb" in vars(comm) and isinstance(parameter_offload.FWD_MODULE_STACK, list)
    wanted = {
        base_optimizer: ["_backward_hook_state", "backward_active_depth", "remaining_grad_acc_hooks"],
        stage_1_and_2: [
            "params_already_reduced",
            "ipg_buckets",
            "_clear_previous_reduced_grads",
            "_release_ipg_buffers",
        ],
        stage3: ["params_already_reduced", "ipg_buckets", "def clear_params", "def clear_backward_seen_flag"],
        parameter_offload: ["_in_forward", "ds_grads_remaining", "applied_pre_backward_ref_cnt"],
        partitioned_param_coordinator: [
            "__inflight_param_registry",
            "__active_backward_submodules",
            "release_and_reset_all",
            "_invalidate_trace",
        ],
    }
    for module, names in wanted.items():
        assert not [name for name in names if name not in names_in(module)]
