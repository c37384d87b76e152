"""The process group of the trainer and the workers of one vLLM server, and the broadcast of weights in it.

Both sides use this module. vLLM's workers import it, so its imports must stay light. torch's default process group is
not used: the trainer and the server each have their own. Rank 0 is the trainer; the workers have the ranks from 1 on.

A transfer begins with a `Rendezvous`, at which all members report that they are ready: otherwise a member could wait
forever in a collective operation that another never joins. It stays open during the transfer, and a member that fails
reports its error to the others through it.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock
from typing import Any, TypeVar

import torch
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from online_dpo.distributed.process_state import environment
from online_dpo.errors import error_text
from online_dpo.rollout.weights.operations import abort, broadcast, run_bounded
from online_dpo.rollout.weights.store import GuestStore, StoreLost

T = TypeVar("T")

BUCKET_BYTES = 256 << 20
ALIGNMENT = 16  # bytes: the size of the largest dtype, so that every tensor can be a view of its bucket
CONNECT_SECONDS = 20.0
POLL_SECONDS, CHECK_SECONDS = 0.0005, 0.1  # between two polls of an operation, and two checks of the other members

_environment_lock = Lock()


class TransferStopped(RuntimeError):
    """A transfer was stopped by this member or by another; the message says why. It may be tried again."""


class Rendezvous:
    """The communication of the members of one transfer, through the trainer's store.

    Args:
        members: the store; for workers a `GuestStore`, see `join`.
        address: the address at which the others reach this member.
        name: the unique name of the transfer.
        timeout: the largest duration of the transfer, in seconds.
        check_request: called at intervals while waiting; raises if the other side has already failed.
    """

    def __init__(
        self, members: Store, address: str, name: str, timeout: float, check_request: Callable[[], None] | None = None
    ):
        self.members, self.address, self.name, self.timeout = members, address, name, timeout
        self.check_request = check_request
        self._deadline = time.monotonic() + timeout
        self.store = PrefixStore(name, members)

    @classmethod
    def join(cls, host: str, port: int, secret: str, name: str, timeout: float) -> Rendezvous:
        """A worker's side, which connects to the trainer.

        Raises:
            TransferStopped: the trainer cannot be reached, or does not know the secret.
        """
        try:
            members = GuestStore(host, port, secret, min(timeout, CONNECT_SECONDS))
        except StoreLost as error:
            raise TransferStopped(
                f"the trainer's port {port} cannot be reached at {host}: {_first_line(error)}. Open it (it is "
                "`vllm_group_port`), or set `vllm_weight_transfer` to `http`"
            ) from error
        return cls(members, members.address, name, timeout)

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Waits until ``done`` returns true.

        Args:
            what: what is waited for, for the message after a timeout.

        Raises:
            TransferStopped: another member has stopped, or the transfer took too long.
        """
        last_check = time.monotonic()
        while not done():
            if time.monotonic() - last_check > CHECK_SECONDS:
                self._check_others(what)
                last_check = time.monotonic()
            time.sleep(POLL_SECONDS)

    @contextmanager
    def reporting_errors_as(self, who: str) -> Iterator[None]:
        """Inside, an error is reported to the other members, as that of ``who``, so that they stop waiting."""
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # if the store is gone, the others find that out themselves
                self.store.set("over", f"{who} gave up: {error_text(error)}")
            raise

    def _check_others(self, what: str) -> None:
        """Checks whether another member has stopped, the store is gone, or the time is over.

        Raises:
            TransferStopped: one of these.
        """
        if self.check_request is not None:
            self.check_request()
        try:
            stopped = self.store.get("over").decode() if self.store.check(["over"]) else ""
        except RuntimeError as error:
            raise TransferStopped(f"the trainer is gone: {_first_line(error)}") from error
        if stopped:
            raise TransferStopped(stopped)
        if time.monotonic() > self._deadline:
            raise TransferStopped(f"{what} took longer than `vllm_server_timeout`, {self.timeout:g} seconds")


class WeightGroup:
    """A process group for broadcasts: NCCL on a GPU, gloo on a CPU. It is used for later transfers as well, until one
    fails or a member is replaced.

    Args:
        name: of the transfer in which it is formed.
        rendezvous: of that transfer; gloo uses its address, NCCL finds one itself.
        rank: of this member; 0 is the trainer.
        size: number of members.
        device: where broadcast tensors are.
    """

    def __init__(self, name: str, rendezvous: Rendezvous, rank: int, size: int, device: torch.device):
        self.name, self.device = name, device
        self._members = rendezvous.members  # the group calls its methods, and does not keep the Python object
        store, timeout = PrefixStore(f"group-{name}", self._members), timedelta(seconds=rendezvous.timeout)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        self._group: Any = self._bounded(
            lambda: _connected(make(store, rank, size, timeout, rendezvous.address), rank, device, rendezvous.timeout),
            rendezvous,
            "the forming of the group for the weights",
            discard=abort,
        )

    def broadcast(self, flat: torch.Tensor, rendezvous: Rendezvous) -> None:
        """Broadcasts a tensor from rank 0 to the others, in place. Afterwards it is there on the device, and its memory
        may be used again.

        Raises:
            TransferStopped: it failed or took too long, another member has stopped, or the group was closed meanwhile.
        """
        what, group = "the broadcast of the weights", self._group
        if group is not None:
            given_up = lambda: self._group is not group  # noqa: E731
            self._bounded(lambda: broadcast(group, flat, rendezvous.timeout, given_up), rendezvous, what)
        if group is None or self._group is not group:
            raise TransferStopped(f"{what} was given up: its group has been closed")

    def close(self) -> None:
        """Frees the group, also while an operation hangs. It cannot be used any more."""
        group, self._group = self._group, None
        if group is not None:
            abort(group)

    def _bounded(
        self,
        function: Callable[[], T],
        rendezvous: Rendezvous,
        what: str,
        discard: Callable[[T], None] = lambda result: None,
    ) -> T:
        """Runs an operation of the group under the limit of a transfer.

        Raises:
            TransferStopped: it failed or took too long, or another member has stopped.
        """
        try:
            return run_bounded(function, self.device, lambda done: rendezvous.wait(done, what), discard)
        except TransferStopped:
            raise
        except RuntimeError as error:
            raise TransferStopped(f"{what} failed: {_first_line(error)}") from error


def form_group_as_trainer(
    rendezvous: Rendezvous, size: int, device: torch.device, held: WeightGroup | None
) -> WeightGroup:
    """The trainer's side of a rendezvous: returns ``held`` if all members still have that group, else a new one.

    Raises:
        TransferStopped: not every worker came.
    """
    keys = [f"ready-{rank}" for rank in range(1, size)]
    rendezvous.wait(lambda: rendezvous.store.check(keys), "waiting for the server's workers")
    held_by_workers = {rendezvous.store.get(key).decode() for key in keys}
    if held is not None and held_by_workers == {held.name} and held.device == device:
        rendezvous.store.set("group", held.name)
        return held
    if held is not None:
        held.close()
    rendezvous.store.set("group", rendezvous.name)
    return WeightGroup(rendezvous.name, rendezvous, 0, size, device)


def form_group_as_worker(
    rendezvous: Rendezvous, rank: int, size: int, device: torch.device, held: WeightGroup | None
) -> WeightGroup:
    """A worker's side of a rendezvous: returns ``held`` if the trainer chooses that group, else a new one.

    Raises:
        TransferStopped: the trainer has stopped.
    """
    rendezvous.store.set(f"ready-{rank}", "" if held is None else held.name)
    rendezvous.wait(lambda: rendezvous.store.check(["group"]), "waiting for the trainer")
    name = rendezvous.store.get("group").decode()
    if held is not None and held.name == name:
        return held
    if held is not None:
        held.close()
    return WeightGroup(name, rendezvous, rank, size, device)


def local_address(host: str, port: int) -> str:
    """The local address of a connection to another machine; that machine can reach us at this address."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        return connection.getsockname()[0]


def send_weights(group: WeightGroup, rendezvous: Rendezvous, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Broadcasts the weights in buckets: for each a header with names, shapes and dtypes, then the values as bytes. An
    empty header ends the transfer.

    With headers, the receivers need not know the weights, and the sender need not have all of them at once.
    """
    for bucket in into_buckets(weights, BUCKET_BYTES):
        header = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in bucket]
        _send_header(group, rendezvous, header)
        group.broadcast(pack([tensor for _, tensor in bucket], group.device), rendezvous)
    _send_header(group, rendezvous, [])


def receive_weights(group: WeightGroup, rendezvous: Rendezvous) -> Iterator[tuple[str, torch.Tensor]]:
    """Receives what `send_weights` sends: yields names and tensors.

    Each bucket has its own memory, because vLLM's loader may keep tensors for a while.
    """
    while header := _receive_header(group, rendezvous):
        metas = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for _, dtype, shape in header]
        starts, total = offsets(metas)
        flat = torch.empty(total, dtype=torch.uint8, device=group.device)
        group.broadcast(flat, rendezvous)
        for (name, _, _), meta, start in zip(header, metas, starts, strict=True):
            yield name, flat[start : start + meta.nbytes].view(meta.dtype).view(meta.shape)
        del flat  # freed before the next bucket is allocated


def into_buckets(
    weights: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Groups weights into lists of at most ``most_bytes``; a larger weight is a list of its own."""
    bucket, size = [], 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def offsets(tensors: Iterable[torch.Tensor]) -> tuple[list[int], int]:
    """The offset of each tensor in a bucket, and the bucket's size, in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(math.ceil(end / ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + tensor.nbytes
    return starts, end


def pack(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bytes of a bucket, (size,) uint8. A single tensor that is contiguous on the device is not copied."""
    if len(tensors) == 1:
        return tensors[0].detach().to(device).contiguous().view(-1).view(torch.uint8)
    starts, total = offsets(tensors)
    flat = torch.empty(total, dtype=torch.uint8, device=device)
    for tensor, start in zip(tensors, starts, strict=True):
        flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return flat


def _send_header(group: WeightGroup, rendezvous: Rendezvous, header: list[Any]) -> None:
    """Broadcasts a header: the number of its bytes, then its JSON."""
    data = json.dumps(header).encode()
    group.broadcast(torch.tensor([len(data)]).view(torch.uint8).to(group.device), rendezvous)
    group.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(group.device), rendezvous)


def _receive_header(group: WeightGroup, rendezvous: Rendezvous) -> list[Any]:
    length = torch.empty(8, dtype=torch.uint8, device=group.device)
    group.broadcast(length, rendezvous)
    data = torch.empty(int(length.cpu().view(torch.int64)), dtype=torch.uint8, device=group.device)
    group.broadcast(data, rendezvous)
    return json.loads(data.cpu().numpy().tobytes())


def _connected(group: Any, rank: int, device: torch.device, seconds: float) -> Any:
    """The group, once a byte has gone through it: NCCL makes its communicator and connections in a first operation."""
    try:
        byte = torch.full((1,), int(rank == 0), dtype=torch.uint8, device=device)
        broadcast(group, byte, seconds, lambda: False)
        if byte.item() != 1:
            raise RuntimeError("what the trainer sent did not arrive")
    except BaseException:
        abort(group)  # one that is dropped instead would abort in its destructor, where an error ends the process
        raise
    return group


def _gloo_group(store: PrefixStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout, options._threads = timeout, 1
    return ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: PrefixStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # longer than that of the rendezvous, whose message says what was waited for
    options.config.blocking = 1  # the other way is off in torch too: NCCL hangs at random, and first operations fail
    with _errors_are_raised():
        return ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _errors_are_raised() -> Iterator[None]:
    """Inside, NCCL groups are created such that a failed operation raises an error, and does not abort the process.

    By default a thread of torch would abort it: the loss of a vLLM server would then end the training run.
    """
    # Read when a group is created: no thread watches over operations that are waited for, and errors are the caller's.
    variables = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    with _environment_lock, environment(**variables):
        yield


def _first_line(error: Exception) -> str:
    return error_text(error, first_line=True)
