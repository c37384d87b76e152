"""The sample of trained weights, also where a process holds a part of them."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from online_dpo.training.update_ratio import UpdatedRatio


def begun(model):
    ratio = UpdatedRatio(lambda: 0)
    ratio.on_train_begin(None, None, None, model=model)
    return ratio


@pytest.mark.smoke
def test_changed_numbers_are_counted_once():
    model = nn.Linear(4, 8)
    model.bias.requires_grad_(False)
    ratio = begun(model)
    assert ratio.drain_changed() == (0, 32)
    with torch.no_grad():
        model.weight[:2] += 1.0
        model.bias += 1.0
    assert ratio.drain_changed() == (8, 32)
    assert ratio.drain_changed() == (0, 32)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_read_where_they_lie(mesh):
    model = nn.Linear(4, 8)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    assert isinstance(model.weight, DTensor)
    ratio = begun(model)
    with torch.no_grad():
        model.weight.to_local()[0] += 1.0
    assert ratio.drain_changed() == (4, 40)


def test_a_process_that_holds_nothing_has_no_sample():
    model = nn.Linear(4, 8)
    model.weight.data = torch.empty(0)
    model.bias.data = torch.empty(0)
    assert begun(model).drain_changed() == (0, 0)
