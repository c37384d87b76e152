"""Servers that the run samples from, the port for their weights, and the address of a Ray cluster."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem
from online_dpo.doctor.registry import check
from online_dpo.errors import RolloutServerError, error_text
from online_dpo.modeling.loading import same_source
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.scoring.rewards.loading import last_part
from online_dpo.training.arguments import check_vllm

PATIENCE = 3.0
"""Seconds in which a server has to answer."""


@check("servers")
def servers(case: Case) -> Iterator[Finding]:
    """vLLM servers answer, hold the run's model and take its weights; ports are free; the Ray cluster is there."""
    args, findings = case.args, []
    if args.engine_name == "vllm_server":
        findings = [finding for url in args.vllm_server_urls for finding in _server(case, url)]
        if args.vllm_weight_transfer == "broadcast" and args.vllm_group_port:
            findings += _port(args.vllm_group_port)
    elif args.use_vllm:
        check_vllm(args)
    if case.subject.ray_address is not None:
        findings += _ray(case.subject.ray_address)
    yield from findings
    if not findings:
        yield ok(
            "vLLM samples in the process that trains" if args.use_vllm else "the policy samples by itself: no server"
        )


def _server(case: Case, url: str) -> Iterator[Finding]:
    one = copy.copy(case.args)
    one.vllm_server_base_url, one.vllm_server_timeout = url, PATIENCE
    client = VLLMClient(url, PATIENCE)
    try:
        check_vllm(one)
        served = client.call("/v1/models")["data"][0]
        client.rpc("online_dpo_lora_rank")
    except RolloutServerError as error:
        found, _, change = error_text(error).partition(". ")
        yield problem(found, change or "Start it with `online-dpo serve`.")
        return
    except (ValueError, KeyError, IndexError, TypeError) as error:
        found, _, change = error_text(error).partition(". ")
        yield problem(found if isinstance(error, ValueError) else f"{url} answers as no vLLM server does", change)
        return
    names = [str(served[name]) for name in ("id", "root") if served.get(name)]
    if not any(_same(name, case.subject.model) for name in names):
        yield problem(
            f"the vLLM server at {url} holds {' or '.join(dict.fromkeys(names))}, and the run trains "
            f"{case.subject.model}",
            f"Start it with `online-dpo serve {case.subject.model}`, or correct `vllm_server_base_url`.",
        )
    else:
        yield ok(f"the vLLM server at {url} holds {names[0]}, and takes weights")


def _same(name: str, model: str) -> bool:
    return same_source(name, model) or last_part(name) == last_part(model)


def _port(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield problem(
                f"port {port} (`vllm_group_port`) cannot be used: {error.strerror}",
                "Give another port, or 0 for any that is free.",
            )


def _ray(address: str) -> Iterator[Finding]:
    """Tries the address of a cluster, if it is one."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port), PATIENCE).close()
    except OSError as error:
        yield problem(
            f"no Ray cluster answers at {address} (`ray.address`): {error.strerror or error}",
            "Start one with `ray start --head`, correct the address, or leave it out.",
        )
    else:
        yield ok(f"something answers at {address} (`ray.address`)")
