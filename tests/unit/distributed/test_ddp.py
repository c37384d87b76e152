"""`GuardedDDP`, in a process group of one: what comes before its operations, and how it is repaired."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from online_dpo.distributed.ddp import GuardedDDP

INPUT = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Checks:
    """Counts the checks, and raises at those with these numbers, from 1."""

    def __init__(self, *fails):
        self.count, self.fails = 0, fails

    def __call__(self):
        self.count += 1
        if self.count in self.fails:
            raise MemoryError


def bare():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model.register_buffer("steps", torch.zeros(2))
    return model


def gradient(model):
    model.zero_grad()
    model(INPUT).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_pass_that_was_left_at_any_check_can_be_made_again(options, number):
    ddp, checks, expected = DistributedDataParallel(bare(), **options), Checks(number), gradient(bare())
    guarded = GuardedDDP(ddp, checks)
    for _ in range(3):
        try:
            got = gradient(ddp)
        except MemoryError:
            guarded.abandon()
            got = gradient(ddp)
        torch.testing.assert_close(got, expected)
    assert checks.count > number


def test_a_model_that_is_not_wrapped_has_nothing_to_check():
    model, checks = bare(), Checks(1)
    GuardedDDP(model, checks).abandon()
    gradient(model)
    assert checks.count == 0


def test_a_communication_hook_of_the_user_s_is_called_after_the_check():
    def double(state, bucket):
        seen.append(state)
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    ddp, checks, expected, seen = DistributedDataParallel(bare()), Checks(3), gradient(bare()), []
    ddp.register_comm_hook("state", double)
    guarded = GuardedDDP(ddp, checks)
    with pytest.raises(MemoryError):
        gradient(ddp)
    assert not seen
    guarded.abandon()
    torch.testing.assert_close(gradient(ddp), [2 * part for part in expected])
    assert seen == ["state"]


def test_under_a_static_graph_every_pass_exchanges_gradients():
    ddp, expected = DistributedDataParallel(bare(), static_graph=True), gradient(bare())
    GuardedDDP(ddp, Checks())
    for _ in range(2):
        ddp.zero_grad()
        for exchanges in (False, False, True):
            if exchanges:
                ddp(INPUT).sum().backward()
            else:
                with ddp.no_sync():
                    ddp(INPUT).sum().backward()
        got = [parameter.grad for parameter in ddp.parameters()]
        torch.testing.assert_close(got, [3 * part for part in expected])
