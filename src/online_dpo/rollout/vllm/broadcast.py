"""The trainer's side of the broadcast of weights to vLLM servers: NCCL between GPUs, gloo otherwise.

Each server forms its own process group with the trainer's first process. So a server that restarts, or is lost during a
transfer, does not disturb the others. All servers receive at the same time.
"""

from __future__ import annotations

import secrets
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from online_dpo.errors import error_text
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.worker import device_name, read_folder
from online_dpo.rollout.weights.export import named_weights
from online_dpo.rollout.weights.operations import in_thread
from online_dpo.rollout.weights.process_group import (
    Rendezvous,
    TransferStopped,
    WeightGroup,
    form_group_as_trainer,
    local_address,
    send_weights,
)
from online_dpo.rollout.weights.store import StoreServer

CAUSE_SECONDS = 2.0  # how long to wait, after a failure, for the server's own error message
PORTS = {"http": 80, "https": 443}


@dataclass
class _Server:
    """A server, the trainer's address as this server reaches it, and the process group with it, if one is formed."""

    client: VLLMClient
    address: str
    group: WeightGroup | None = None


class BroadcastTransfer:
    """Broadcasts the policy's weights to servers, as often as they need them.

    Weights are read from the model, one bucket at a time. A server that restarts needs them again later. If the model
    is trained while servers sample (``max_staleness``), it cannot be read again by then, so weights are copied to host
    memory first. If it is sharded, this process cannot read it without the others, so weights are read from files.

    Args:
        port: the port where servers reach the trainer (``vllm_group_port``); 0 is any free one.
        device: the policy's device.
        overlaps: whether the policy is trained while servers sample.

    Raises:
        ValueError: the port cannot be used, or a server cannot be reached.
    """

    def __init__(self, clients: Sequence[VLLMClient], port: int, device: torch.device, overlaps: bool) -> None:
        self._device, self._overlaps = device, overlaps
        self._servers = {client.url: _Server(client, _address_for(client)) for client in clients}
        listeners = _listen([server.address for server in self._servers.values()], port)
        self._port, self._secret = listeners[0].getsockname()[1], secrets.token_hex(32)
        self._store = StoreServer(listeners, self._secret)
        self._weights: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None = None

    def set_weights(self, model: nn.Module) -> None:
        """Makes the weights of a model that is not sharded those that `push` sends."""
        self._weights = None  # frees the last copy before the next one is made
        if self._overlaps:
            copied = {name: tensor.to("cpu", copy=True) for name, tensor in named_weights(model)}
            self._weights = lambda: iter(copied.items())
        else:
            self._weights = lambda: named_weights(model)

    def set_folder(self, folder: Path) -> None:
        """Makes the weights in the safetensors files of a folder those that `push` sends, until it is deleted."""
        self._weights = lambda: read_folder(folder)

    def push(self, client: VLLMClient, label: str) -> None:
        """Pauses the server and replaces its weights. It stays paused until ``/resume`` is called.

        Raises:
            RolloutServerError: it failed for `vllm_server_timeout` seconds, or cannot load the weights.
        """
        server = self._servers[client.url]
        client.keep_trying("/collective_rpc", lambda: self._push_once(server, label))

    def close(self) -> None:
        """Frees the groups, the port and the weights."""
        for server in self._servers.values():
            self._close_group(server)
        self._store.close()
        self._weights = None

    def _push_once(self, server: _Server, label: str) -> None:
        """One attempt of `push`: the server receives in an RPC, which runs in a thread while this side sends."""
        client, name = server.client, uuid.uuid4().hex
        client.once("/pause?mode=abort&clear_cache=false", {})  # in each attempt: a restarted server is not paused
        size = 1 + client.once("/get_world_size?include_dp=true")["world_size"]
        devices = client.once("/collective_rpc", {"method": "online_dpo_device"})["results"]
        on_gpus = self._device.type == "cuda" and all(device.startswith("cuda") for device in devices)
        kind = "nccl" if on_gpus else "gloo"
        device = self._device if kind == "nccl" else torch.device("cpu")
        arguments = [server.address, str(self._port), self._secret, name, str(size), kind, str(client.timeout), label]
        call = {"method": "online_dpo_load_broadcast", "args": arguments}
        rendezvous = Rendezvous(self._store.store, server.address, name, client.timeout)
        request = in_thread(lambda: client.once("/collective_rpc", call))
        rendezvous.check_request = lambda: _check_answer(request)
        on_device = torch.cuda.device(device) if kind == "nccl" else nullcontext()
        try:
            with on_device, rendezvous.reporting_errors_as("the trainer"):
                assert self._weights is not None
                server.group = form_group_as_trainer(rendezvous, size, device, server.group)
                send_weights(server.group, rendezvous, self._weights())
                rendezvous.wait(request.done, "loading the weights")
                _check_answer(request)
        except BaseException as error:
            self._close_group(server)
            if isinstance(error, TransferStopped):
                wait_for([request], timeout=CAUSE_SECONDS)
                _check_answer(request)  # raises the server's own error, which is closer to the cause
            raise

    def _close_group(self, server: _Server) -> None:
        if server.group is not None:
            server.group.close()
            server.group = None


def choose_transfer(wanted: str, clients: Sequence[VLLMClient], device: torch.device, takes_adapters: bool) -> str:
    """How weights are sent: ``broadcast``, ``file``, ``http``, or ``auto`` (files if the server can read the trainer's
    folder, else HTTP).

    Args:
        wanted: the configured ``vllm_weight_transfer``.
        takes_adapters: whether the servers were started with ``--lora-rank``.

    Raises:
        ValueError: the configured way is not possible with these servers.
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
    server_devices = [name for client in clients for name in client.rpc("online_dpo_device")]
    shared = device_name(device) in server_devices and device.type == "cuda"
    if wanted == "broadcast" and shared:
        raise ValueError(
            "A server computes on the trainer's own GPU, and NCCL cannot send from a GPU to itself. Give the server "
            "another one with `CUDA_VISIBLE_DEVICES`, or leave `vllm_weight_transfer` `auto`."
        )
    if wanted == "broadcast" or (not shared and all(name.startswith("cuda") for name in server_devices)):
        return "broadcast"
    return "auto"


def _address_for(client: VLLMClient) -> str:
    """The trainer's address, as this server reaches it."""
    url = urlsplit(client.url)
    assert url.hostname is not None
    try:
        return local_address(url.hostname, url.port or PORTS[url.scheme])
    except OSError as error:
        raise ValueError(f"{client.url} cannot be reached: {error_text(error)}.") from error


def _listen(addresses: Sequence[str], port: int) -> list[socket.socket]:
    """Listening sockets, on the addresses that the servers use, so that no other network reaches them."""
    listeners: list[socket.socket] = []
    try:
        for host in dict.fromkeys(addresses):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(socket.create_server((host, port), family=family))
            port = listeners[0].getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ValueError(
            f"Port {port} cannot be used to send weights to vLLM servers: {error.strerror}. Set `vllm_group_port` to "
            "another; 0 takes any that is free."
        ) from error
    return listeners


def _check_answer(request: Future[Any]) -> None:
    """Checks the server's answer, if it has come.

    Raises:
        TransferStopped: the answer says that a worker has stopped the transfer.
    """
    if request.done():
        reasons = [reason for reason in request.result()["results"] if reason]
        if reasons:
            raise TransferStopped(reasons[0])
