"""A trainer and two workers over groups that fail, hang and report as NCCL's do: stubs of torch's group and work."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from online_dpo.rollout.weights import operations, process_group
from online_dpo.rollout.weights.process_group import Rendezvous, TransferStopped, WeightGroup, receive_weights
from support.processes import environment
from support.weight_transfers import CPU, SECRET, port_of, receive, send, weights

Gloo = dist.ProcessGroupGloo
FAILED = "NCCL error: remote process exited or there was a network error"


class NcclWork:
    """What torch's `WorkNCCL` tells: an error counts as completed, and only a `wait` with a limit raises it."""

    def __init__(self, work, error):
        self.work, self.error = work, error

    def is_completed(self):
        return self.error is not None or self.work.is_completed()

    def wait(self, timeout=timedelta(0)):
        if timeout == timedelta(0):
            return True  # the stream of the caller waits, and nothing else
        if self.error is not None:
            raise dist.DistBackendError(self.error)
        return self.work.wait()


class NcclGroup:
    """A group of gloo with the ways of NCCL: no connection before the first broadcast, and works as above.

    ``fails`` and ``hangs`` say at which broadcast of which rank that happens; the first of a group is number 1.
    """

    fails: dict[int, int] = {}
    hangs: dict[int, int] = {}
    made: list["NcclGroup"] = []
    create_device, _Options = staticmethod(Gloo.create_device), Gloo._Options

    def __init__(self, store, rank, size, options):
        self.arguments, self.rank, self.number = (store, rank, size, options), rank, 0
        self.let_go, self.aborted = threading.Event(), threading.Event()
        NcclGroup.made.append(self)

    def broadcast(self, tensors, options):
        self.number += 1
        if self.number == NcclGroup.hangs.get(self.rank):
            self.let_go.wait()
        if self.number == NcclGroup.fails.get(self.rank):
            return NcclWork(None, FAILED)
        if self.number == 1:
            self.group = Gloo(*self.arguments)
        return NcclWork(self.group.broadcast(tensors, options), None)

    def abort(self):
        self.aborted.set()


@pytest.fixture(autouse=True)
def nccl(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupGloo", NcclGroup)
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 1)
    NcclGroup.fails, NcclGroup.hangs, NcclGroup.made = {}, {}, []
    yield NcclGroup
    for group in NcclGroup.made:
        group.let_go.set()


@pytest.fixture
def of_rank(nccl):
    return lambda rank: next(group for group in nccl.made if group.rank == rank)


def errors_of(threads, server, timeout=30.0):
    """What each member's transfer ends with, by rank."""
    members = [threads.submit(send, server, "one", None, None, timeout)]
    members += [threads.submit(receive, server, "one", rank, None, timeout) for rank in (1, 2)]
    return [member.exception() for member in members]


def test_weights_arrive_over_a_group_that_connects_at_its_first_broadcast(server, threads):
    assert errors_of(threads, server) == [None, None, None]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_a_broadcast_that_failed_is_not_taken_for_one_that_arrived(server, threads, nccl, number):
    """At the forming, at both parts of a header, at a bucket; all members learn of it."""
    nccl.fails = {1: number}
    started = time.monotonic()
    trainer, failed, other = errors_of(threads, server)
    assert isinstance(failed, TransferStopped) and FAILED in str(failed)
    for error in (trainer, other):
        assert isinstance(error, TransferStopped) and "worker 1 gave up" in str(error) and FAILED in str(error)
    assert time.monotonic() - started < 25  # not their time limit


def test_a_bucket_that_never_arrived_is_never_handed_to_a_loader(server, threads, nccl):
    nccl.fails = {1: 4 + 3}  # the byte of the forming, three broadcasts for the first weight, the values of the second
    loaded = []

    def loading(rank):
        rendezvous = Rendezvous.join("127.0.0.1", port_of(server), SECRET, "one", 30.0)
        with rendezvous.reporting_errors_as(f"worker {rank}"):
            group = process_group.form_group_as_worker(rendezvous, rank, 3, CPU, None)
            for name, _ in receive_weights(group, rendezvous):
                loaded.append((rank, name))

    members = [threads.submit(send, server, "one", None, None, 30.0)]
    members += [threads.submit(loading, rank) for rank in (1, 2)]
    assert all(isinstance(member.exception(), TransferStopped) for member in members)
    assert [name for rank, name in loaded if rank == 1] == [weights()[0][0]]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_communicator_that_is_never_made_ends_after_the_time_limit(server, threads, nccl, of_rank, rank):
    """A worker that dies while others make it leaves them in the first broadcast, in code that nothing interrupts."""
    nccl.hangs = {rank: 1}
    started = time.monotonic()
    stopped = errors_of(threads, server, timeout=1.5)
    assert all(isinstance(error, TransferStopped) for error in stopped)
    assert "the forming of the group for the weights" in str(stopped[rank])
    assert time.monotonic() - started < 60
    assert not of_rank(rank).aborted.is_set()
    of_rank(rank).let_go.set()  # it ends at last, and nobody waits for it any more
    assert of_rank(rank).aborted.wait(60)


@pytest.mark.parametrize("number", [1, 3])
def test_the_trainer_learns_at_once_of_a_server_that_is_gone_while_it_is_inside_of_torch(server, nccl, number):
    nccl.hangs = {0: number}
    gone = threading.Event()

    def check_request():
        if gone.is_set():
            raise ConnectionError("the server is gone")

    def trainer():
        rendezvous = Rendezvous(server.store, "127.0.0.1", "one", 60.0, check_request)
        group = process_group.form_group_as_trainer(rendezvous, 1, CPU, None)
        process_group.send_weights(group, rendezvous, weights())

    with ThreadPoolExecutor(1) as one:
        sending = one.submit(trainer)
        while not (nccl.made and nccl.made[0].number == number):
            time.sleep(0.01)
        gone.set()
        assert isinstance(sending.exception(60), ConnectionError)


def test_a_group_is_closed_while_an_operation_and_its_end_hang(server, nccl, monkeypatch, caplog):
    monkeypatch.setattr(operations, "ABORT_SECONDS", 0.2)
    rendezvous = Rendezvous(server.store, "127.0.0.1", "one", 60.0)
    group = WeightGroup("one", rendezvous, 0, 1, CPU)
    nccl.hangs = {0: 2}
    monkeypatch.setattr(nccl, "abort", lambda self: self.let_go.wait())
    with ThreadPoolExecutor(1) as one:
        sending = one.submit(group.broadcast, torch.zeros(3), rendezvous)
        while nccl.made[0].number < 2:
            time.sleep(0.01)
        group.close()
        assert "could not be ended within 0.2 s" in caplog.text
        nccl.made[0].let_go.set()
        with pytest.raises(TransferStopped, match="its group has been closed"):
            sending.result(60)
    with pytest.raises(TransferStopped, match="its group has been closed"):
        group.broadcast(torch.zeros(3), rendezvous)


def test_an_end_that_fails_is_told_of_and_hides_no_other_error(server, nccl, monkeypatch, caplog):
    def failing(self):
        raise RuntimeError("unhandled cuda error\nC++ CapturedCallStack")

    monkeypatch.setattr(nccl, "abort", failing)
    nccl.fails = {0: 1}
    with pytest.raises(TransferStopped, match="the forming of the group for the weights failed: NCCL error"):
        WeightGroup("one", Rendezvous(server.store, "127.0.0.1", "one", 60.0), 0, 1, CPU)
    assert "A process group for weights could not be ended: unhandled cuda error." in caplog.text


def test_a_broadcast_is_waited_for_until_it_is_there():
    """`wait` orders streams only: the memory may be read and used again when the device is done, which is polled."""
    done = []

    class Work:
        def is_completed(self):
            done.append("polled")
            return len(done) == 4

        def wait(self, timeout):
            assert timeout > timedelta(0)  # without a limit, the error of an operation that failed is not raised
            done.append("asked")

    group = SimpleNamespace(broadcast=lambda tensors, options: Work())
    operations.broadcast(group, torch.zeros(3), 60.0, lambda: False)
    assert done == ["polled"] * 4 + ["asked"]


def test_a_process_ends_while_a_communicator_hangs():
    program = """
from datetime import timedelta
import torch
import torch.distributed as dist
from online_dpo.rollout.weights.process_group import Rendezvous, TransferStopped, WeightGroup
class Hanging(dist.ProcessGroupGloo):
    def __init__(self, store, rank, size, options):
        super().__init__(dist.HashStore(), 0, 2, timedelta(seconds=600))  # in C++, for the other that never comes
dist.ProcessGroupGloo = Hanging
try:
    WeightGroup("one", Rendezvous(dist.HashStore(), "127.0.0.1", "one", 0.5), 0, 1, torch.device("cpu"))
except TransferStopped as error:
    print(error)
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "took longer than `vllm_server_timeout`, 0.5 seconds" in done.stdout
    assert time.monotonic() - started < 100


def test_groups_of_nccl_raise_their_errors_and_leave_the_process_alone(monkeypatch):
    """No thread of torch's watches over them, and their communicators are made by calls that return when they are."""
    seen = {}
    names = ("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING")

    class Group:
        @staticmethod
        def Options():  # noqa: N802  (torch's name)
            return SimpleNamespace(config=SimpleNamespace(blocking=None))

        def __init__(self, store, rank, size, options):
            seen.update({name: os.environ.get(name) for name in names}, blocking=options.config.blocking)
            seen["timeout"] = options._timeout

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    before = {name: os.environ.get(name) for name in names}
    process_group._nccl_group(None, 0, 2, timedelta(seconds=7), "unused")
    assert seen == {names[0]: "1", names[1]: "0", "blocking": 1, "timeout": timedelta(seconds=14)}
    assert {name: os.environ.get(name) for name in names} == before
