"""A process group of a trainer and the workers of one vLLM server, and weights that are broadcast in it.

Both sides use this file; vLLM's workers import it, so keep the imports light. torch's default group is not touched:
trainer and server have one each, for work of their own. Rank 0 is the trainer, the workers follow.

A transfer begins with a `Meeting`, at which all say that they are there, so that none waits in a collective operation
for one that never comes. It stays open meanwhile: whoever gives up tells the others through it.
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
from typing import Any

import torch
from torch.distributed import (
    BroadcastOptions,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from online_dpo.distributed.process_state import environment
from online_dpo.errors import error_text

BUCKET_BYTES = 256 << 20
ALIGNMENT = 16  # bytes; that of the largest dtype
CONNECT_SECONDS = 20.0
PAUSE_SECONDS, LOOK_SECONDS = 0.0005, 0.1  # between two looks at an operation, and at the others

_environment_lock = Lock()


class TransferStopped(RuntimeError):
    """This side or another has given a transfer up; the message says why. It may be tried again."""


class Rendezvous:
    """What the members of one transfer tell one another, by way of the trainer's store.

    Args:
        host, port: where the trainer's store listens.
        name: no other transfer has it.
        timeout: seconds that the transfer may take.
        watch: raises when there is nothing left to wait for; called now and then.

    Raises:
        TransferStopped: the store cannot be reached.
    """

    def __init__(self, host: str, port: int, name: str, timeout: float, watch: Callable[[], None] | None = None):
        self.host, self.port, self.name, self.timeout, self.watch = host, port, name, timeout, watch
        self._deadline = time.monotonic() + timeout
        try:
            limit = timedelta(seconds=min(timeout, CONNECT_SECONDS))
            self.tcp = TCPStore(host, port, None, False, limit)
        except RuntimeError as error:
            raise TransferStopped(
                f"the trainer's port {port} cannot be reached at {host}: {_first_line(error)}. Open it (it is "
                "`vllm_group_port`), or set `vllm_weight_transfer` to `http`"
            ) from error
        self.store = PrefixStore(name, self.tcp)

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """
        Raises:
            TransferStopped: somebody gave up, or ``done`` did not come true in time.
        """
        looked = time.monotonic()
        while not done():
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look(what)
                looked = time.monotonic()
            time.sleep(PAUSE_SECONDS)

    @contextmanager
    def telling(self, who: str) -> Iterator[None]:
        """An error inside is told to the others, so that they do not wait."""
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # without the store they know it already
                self.store.set("over", f"{who} gave up: {error_text(error)}")
            raise

    def _look(self, what: str) -> None:
        if self.watch is not None:
            self.watch()
        try:
            over = self.store.get("over").decode() if self.store.check(["over"]) else ""
        except RuntimeError as error:
            raise TransferStopped(f"the trainer is gone: {_first_line(error)}") from error
        if over:
            raise TransferStopped(over)
        if time.monotonic() > self._deadline:
            raise TransferStopped(f"{what} took longer than `vllm_server_timeout`, {self.timeout:g} seconds")


class WeightGroup:
    """NCCL on a GPU, gloo on a CPU. Kept from transfer to transfer, until one fails or a member is another.

    Args:
        address: of this member, at which the others reach it (gloo only; NCCL finds its own).
    """

    def __init__(self, name: str, meeting: Rendezvous, rank: int, size: int, device: torch.device, address: str):
        self.name, self.device = name, device
        store, timeout = PrefixStore(f"group-{name}", meeting.tcp), timedelta(seconds=meeting.timeout)
        try:
            make = _nccl_group if device.type == "cuda" else _gloo_group
            self._group: Any = make(store, rank, size, timeout, address)
        except RuntimeError as error:
            raise TransferStopped(f"the group cannot be formed: {_first_line(error)}") from error

    def broadcast(self, flat: torch.Tensor, meeting: Rendezvous) -> None:
        """From rank 0 to the others, in place.

        Raises:
            TransferStopped: it failed, took too long, or somebody gave up.
        """
        options = BroadcastOptions()
        options.rootRank = 0
        try:
            work = self._group.broadcast([flat], options)
            meeting.wait(work.is_completed, "the broadcast of the weights")
            work.wait()
        except TransferStopped:
            raise
        except RuntimeError as error:
            raise TransferStopped(f"the broadcast of the weights failed: {_first_line(error)}") from error

    def close(self) -> None:
        """Frees what is held, also while an operation hangs. The group cannot be used any more."""
        if self._group is not None:
            self._group.abort()
            self._group = None


def lead(meeting: Rendezvous, size: int, device: torch.device, held: WeightGroup | None) -> WeightGroup:
    """The trainer's side of a meeting: the group that all members hold still, or a new one.

    Raises:
        TransferStopped: not all came.
    """
    places = [f"ready-{rank}" for rank in range(1, size)]
    meeting.wait(lambda: meeting.store.check(places), "waiting for the server's workers")
    theirs = {meeting.store.get(place).decode() for place in places}
    if held is not None and theirs == {held.name} and held.device == device:
        meeting.store.set("group", held.name)
        return held
    if held is not None:
        held.close()
    meeting.store.set("group", meeting.name)
    return WeightGroup(meeting.name, meeting, 0, size, device, meeting.host)


def follow(meeting: Rendezvous, rank: int, size: int, device: torch.device, held: WeightGroup | None) -> WeightGroup:
    """A worker's side of a meeting.

    Raises:
        TransferStopped: the trainer gave up.
    """
    meeting.store.set(f"ready-{rank}", "" if held is None else held.name)
    meeting.wait(lambda: meeting.store.check(["group"]), "waiting for the trainer")
    name = meeting.store.get("group").decode()
    if held is not None and held.name == name:
        return held
    if held is not None:
        held.close()
    return WeightGroup(name, meeting, rank, size, device, own_address(meeting.host, meeting.port))


def own_address(host: str, port: int) -> str:
    """The address of this machine from which it reaches another, at which that one can therefore answer."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        return connection.getsockname()[0]


def send_weights(group: WeightGroup, meeting: Rendezvous, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Broadcasts the weights, bucket by bucket: names, shapes and dtypes first, so that nothing has to be known or
    gathered beforehand; then the values as bytes. An empty bucket is the end.
    """
    for bucket in in_buckets(weights, BUCKET_BYTES):
        header = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in bucket]
        _send_header(group, meeting, header)
        group.broadcast(pack([tensor for _, tensor in bucket], group.device), meeting)
    _send_header(group, meeting, [])


def receive_weights(group: WeightGroup, meeting: Rendezvous) -> Iterator[tuple[str, torch.Tensor]]:
    """What `send_weights` sends. Each bucket has memory of its own, as a loader may keep tensors for a while."""
    while header := _receive_header(group, meeting):
        metas = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for _, dtype, shape in header]
        starts, total = offsets(metas)
        flat = torch.empty(total, dtype=torch.uint8, device=group.device)
        group.broadcast(flat, meeting)
        for (name, _, _), meta, start in zip(header, metas, starts, strict=True):
            yield name, flat[start : start + meta.nbytes].view(meta.dtype).view(meta.shape)
        del flat  # before the next one is made


def in_buckets(
    weights: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """As many weights together as fit, at least one."""
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
    """Where each tensor begins in a bucket, and the bucket's length, in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(math.ceil(end / ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + tensor.nbytes
    return starts, end


def pack(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bucket's bytes. One that holds a single tensor is that tensor, without a copy where it lies as it should."""
    if len(tensors) == 1:
        return tensors[0].detach().to(device).contiguous().view(-1).view(torch.uint8)
    starts, total = offsets(tensors)
    flat = torch.empty(total, dtype=torch.uint8, device=device)
    for tensor, start in zip(tensors, starts, strict=True):
        flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return flat


def _send_header(group: WeightGroup, meeting: Rendezvous, header: list[Any]) -> None:
    data = json.dumps(header).encode()
    group.broadcast(torch.tensor([len(data)]).view(torch.uint8).to(group.device), meeting)
    group.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(group.device), meeting)


def _receive_header(group: WeightGroup, meeting: Rendezvous) -> list[Any]:
    length = torch.empty(8, dtype=torch.uint8, device=group.device)
    group.broadcast(length, meeting)
    data = torch.empty(int(length.cpu().view(torch.int64)), dtype=torch.uint8, device=group.device)
    group.broadcast(data, meeting)
    return json.loads(data.cpu().numpy().tobytes())


def _gloo_group(store: PrefixStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout, options._threads = timeout, 1
    return ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: PrefixStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # ours is to end first: it is told in words
    with _surviving_failures():
        return ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _surviving_failures() -> Iterator[None]:
    """A group made here ends with its operations. Others end the process when one fails, and with it, for the loss of a
    server, the training run.
    """
    variable = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read when a group is made; 0: leave failures to the caller
    with _environment_lock, environment(**{variable: "0"}):
        yield


def _first_line(error: Exception) -> str:
    return error_text(error, first_line=True)
