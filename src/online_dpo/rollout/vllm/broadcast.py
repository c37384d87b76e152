"""The trainer's side of weights that are broadcast to vLLM servers: NCCL between GPUs, gloo otherwise.

Each server forms a group of its own with the trainer's first process. So one that restarts, or is lost in the midst of
a transfer, leaves the others alone; they receive at the same time.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from online_dpo.errors import error_text
from online_dpo.modeling.introspection import unwrapped
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.worker import device_name
from online_dpo.rollout.weights.export import named_weights
from online_dpo.rollout.weights.process_group import (
    Rendezvous,
    TransferStopped,
    WeightGroup,
    lead,
    own_address,
    send_weights,
)

CAUSE_SECONDS = 2.0  # after a failure: time for the server to say what it knows of it
PORTS = {"http": 80, "https": 443}


@dataclass
class _Server:
    client: VLLMClient
    address: str  # ours, as this server sees it
    group: WeightGroup | None = None


class BroadcastTransfer:
    """Sends weights to servers, again and again.

    They come from the model itself, a bucket at a time. Where it cannot be asked again for a server that restarts, they
    are copied to the machine's memory first, and kept until the next `take`: when it is trained while servers sample
    (``max_staleness``), or is sharded.

    Args:
        port: where servers reach the trainer, ``vllm_group_port``; 0 is any that is free.
        device: where the policy is.
        overlaps: the policy is trained while servers sample.

    Raises:
        ValueError: the port is taken.
    """

    def __init__(self, clients: Sequence[VLLMClient], port: int, device: torch.device, overlaps: bool) -> None:
        self._device, self._overlaps = device, overlaps
        self._servers = {client.url: _Server(client, _address_for(client)) for client in clients}
        listener = _listen([server.address for server in self._servers.values()], port)
        self._port = listener.getsockname()[1]
        own, limit = next(iter(self._servers.values())).address, timedelta(seconds=60)
        self._store: TCPStore | None = TCPStore(
            own, self._port, None, True, limit, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._weights: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None = None

    def take(self, model: nn.Module) -> None:
        """Send these weights from now on. Those who only help to gather sharded weights call `help_to_take`."""
        self._weights = None  # before there is a second copy
        if self._overlaps or is_sharded(model):
            copied = {name: tensor.to("cpu", copy=True) for name, tensor in named_weights(model)}
            self._weights = lambda: iter(copied.items())
        else:
            self._weights = lambda: named_weights(model)

    def push(self, client: VLLMClient, label: str) -> None:
        """Replaces the server's weights; it stands still from now until somebody resumes it.

        Raises:
            RolloutServerError: it failed for `vllm_server_timeout` seconds, or cannot load the weights.
        """
        server = self._servers[client.url]
        client.keep_trying("/collective_rpc", lambda: self._push_once(server, label))

    def close(self) -> None:
        """Frees the groups, the port and the weights."""
        for server in self._servers.values():
            self._leave(server)
        self._store = self._weights = None

    def _push_once(self, server: _Server, label: str) -> None:
        client, name = server.client, uuid.uuid4().hex
        client.once("/pause?mode=abort&clear_cache=false", {})  # in each attempt: a server that restarts has forgotten
        size = 1 + client.once("/get_world_size?include_dp=true")["world_size"]
        theirs = client.once("/collective_rpc", {"method": "online_dpo_device"})["results"]
        kind = "nccl" if self._device.type == "cuda" and all(device.startswith("cuda") for device in theirs) else "gloo"
        device = self._device if kind == "nccl" else torch.device("cpu")
        arguments = [server.address, str(self._port), name, str(size), kind, str(client.timeout), label]
        call = {"method": "online_dpo_load_broadcast", "args": arguments}
        meeting = Rendezvous(server.address, self._port, name, client.timeout)
        request = _in_thread(lambda: client.once("/collective_rpc", call))
        meeting.watch = lambda: _check(request)
        on_device = torch.cuda.device(device) if kind == "nccl" else nullcontext()
        try:
            with on_device, meeting.telling("the trainer"):
                assert self._weights is not None
                server.group = lead(meeting, size, device, server.group)
                send_weights(server.group, meeting, self._weights())
                meeting.wait(request.done, "loading the weights")
                _check(request)
        except BaseException as error:
            self._leave(server)
            if isinstance(error, TransferStopped):
                wait_for([request], timeout=CAUSE_SECONDS)
                _check(request)  # what the server says is closer to the cause
            raise

    def _leave(self, server: _Server) -> None:
        if server.group is not None:
            server.group.close()
            server.group = None


def help_to_take(model: nn.Module) -> None:
    """The part of `BroadcastTransfer.take` that the other training processes have in it."""
    weights = named_weights(model)
    if is_sharded(model):
        for _ in weights:
            pass


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in unwrapped(model).parameters())


def choose_transfer(wanted: str, clients: Sequence[VLLMClient], device: torch.device, takes_adapters: bool) -> str:
    """``broadcast``, ``file``, ``http``, or ``auto``: files where a server sees them, else HTTP.

    Raises:
        ValueError: what is wanted cannot be.
        RolloutServerError: a server does not answer.
    """
    if takes_adapters:
        if wanted not in ("auto", "file"):
            raise ValueError(
                f"Servers started with `--lora-rank` read adapters as files, so `vllm_weight_transfer` cannot be "
                f"{wanted!r}; leave it `auto`."
            )
        return wanted
    if wanted not in ("auto", "broadcast") or (wanted == "auto" and device.type != "cuda"):
        return wanted
    theirs = [name for client in clients for name in client.rpc("online_dpo_device")]
    shared = device_name(device) in theirs and device.type == "cuda"
    if wanted == "broadcast" and shared:
        raise ValueError(
            "A server computes on the trainer's own GPU, and NCCL does not go from a GPU to itself. Give the server "
            "another one with `CUDA_VISIBLE_DEVICES`, or leave `vllm_weight_transfer` `auto`."
        )
    if wanted == "broadcast" or (not shared and all(name.startswith("cuda") for name in theirs)):
        return "broadcast"
    return "auto"


def _address_for(client: VLLMClient) -> str:
    url = urlsplit(client.url)
    assert url.hostname is not None
    try:
        return own_address(url.hostname, url.port or PORTS[url.scheme])
    except OSError as error:
        raise ValueError(f"{client.url} cannot be reached: {error_text(error)}.") from error


def _listen(addresses: Sequence[str], port: int) -> socket.socket:
    """On the address that servers use, so that others do not reach it; on all where there are several."""
    host = addresses[0] if len(set(addresses)) == 1 else ""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"Port {port} cannot be used to send weights to vLLM servers: {error.strerror}. Set `vllm_group_port` to "
            "another; 0 takes any that is free."
        ) from error


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """As a pool would; but nobody waits, at the end of the process, for a server that does not answer."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="broadcast").start()
    return future


def _check(request: Future[Any]) -> None:
    """Raises what the server's answer says, if there is one."""
    if request.done():
        reasons = [reason for reason in request.result()["results"] if reason]
        if reasons:
            raise TransferStopped(reasons[0])
