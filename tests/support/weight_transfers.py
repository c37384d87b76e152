"""Members of a transfer of weights on a CPU: a trainer and workers, each of which may run in a thread."""

from __future__ import annotations

import torch

from online_dpo.rollout.weights.process_group import (
    Rendezvous,
    form_group_as_trainer,
    form_group_as_worker,
    receive_weights,
    send_weights,
)

CPU = torch.device("cpu")
SIZE = 3
SECRET = "of the run"


def port_of(server):
    return server._listeners[0].getsockname()[1]


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(40, 30, generator=generator)
    return [
        ("big", big),
        ("turned", big[:5, :7].T),
        ("half", torch.randn(3, 5, generator=generator).bfloat16()),
        ("odd", torch.arange(7, dtype=torch.uint8)),
        ("double", torch.randn(2, dtype=torch.float64, generator=generator)),
        ("scalar", torch.tensor(0.5 + seed)),
        ("empty", torch.zeros(0, 4)),
        ("flags", torch.tensor([True, False, True])),
    ]


def send(server, name, held=None, tensors=None, timeout=10.0):
    rendezvous = Rendezvous(server.store, "127.0.0.1", name, timeout)
    with rendezvous.reporting_errors_as("the trainer"):
        group = form_group_as_trainer(rendezvous, SIZE, CPU, held)
        send_weights(group, rendezvous, weights() if tensors is None else tensors)
    return group


def receive(server, name, rank, held=None, timeout=10.0):
    rendezvous = Rendezvous.join("127.0.0.1", port_of(server), SECRET, name, timeout)
    with rendezvous.reporting_errors_as(f"worker {rank}"):
        group = form_group_as_worker(rendezvous, rank, SIZE, CPU, held)
        return group, {name: tensor.clone() for name, tensor in receive_weights(group, rendezvous)}
