"""Weights that are broadcast to real vLLM servers, by gloo: the same code as between GPUs, but for the group's kind."""

import os
import signal
import time

import pytest
import torch

from online_dpo.errors import RolloutServerError
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm import broadcast
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from online_dpo.rollout.weights import process_group
from online_dpo.rollout.weights.export import named_weights
from online_dpo.rollout.weights.process_group import WeightGroup
from support import tiny, vllm_tools
from support.processes import free_port

FAMILY = "qwen2-tied"
KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
FIELDS = dict(vllm_weight_transfer="broadcast", vllm_group_port=0)


@pytest.fixture(scope="module")
def others(server_of, tmp_path_factory):
    """Two servers beside the first, started at the same time: of another family, and a second one of its own."""
    second = vllm_tools.ServerProcess(FAMILY, tmp_path_factory.mktemp("second"))
    yield {"llama-untied": server_of("llama-untied"), "second": second}
    second.kill()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(process_group, "BUCKET_BYTES", 100_000)


def connect(*urls, timeout=120.0, **fields):
    served = dict(use_vllm=True, vllm_mode="server", vllm_server_timeout=timeout)
    args = vllm_tools.arguments(**{**served, **FIELDS, **fields})
    return VLLMServerEngine(urls, tiny.tokenizer(), args)


def sample(engine):
    return engine.generate(tiny.prompts((3, 40, 1, 7, 70)), 3, PARAMS, KEY)


def check_sync(engine, model, version):
    """The prompts are the same each time and longer than a block, so that a prefix cache which was kept would show."""
    engine.sync(model, version)
    groups = sample(engine)
    assert vllm_tools.largest_error(model, groups) < 1e-4
    assert {c.policy_version for g in groups for c in g.completions} == {version}


def at_broadcast(monkeypatch, engine, process, number, act):
    """Calls ``act`` before the broadcast of this number, counted from now, to this server."""
    count, broadcast = [0], WeightGroup.broadcast

    def counted(group, flat, rendezvous):
        if group is engine._broadcast._servers[process.url].group:
            count[0] += 1
            if count[0] == number:
                act()
        broadcast(group, flat, rendezvous)

    monkeypatch.setattr(WeightGroup, "broadcast", counted)
    return count


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("family", vllm_tools.FAMILIES)
def test_each_sync_brings_the_latest_weights_in_one_group(server, others, family, max_staleness):
    """With ``max_staleness`` from a copy, without from the model."""
    engine = connect(others[family].url if family in others else server.url, max_staleness=max_staleness)
    model, names = vllm_tools.policy(family), set()
    for version in (1, 2, 3):
        vllm_tools.change_weights(model, version)
        check_sync(engine, model, version)
        [held] = engine._broadcast._servers.values()
        names.add(held.group.name)
    assert len(names) == 1 and not torch.distributed.is_initialized()
    engine.close()


def test_adapters_are_merged_on_the_way(server):
    engine, model = connect(server.url), vllm_tools.lora_policy(FAMILY)
    check_sync(engine, model, 1)
    vllm_tools.change_weights(model, 1, only_trainable=True)
    check_sync(engine, model, 2)
    engine.close()


@pytest.mark.slow
def test_of_two_servers_one_is_lost_in_the_midst_of_a_transfer_and_comes_back(server, others, monkeypatch):
    """The other one is not disturbed. Prompts are spread over both."""
    engine, model = connect(server.url, others["second"].url), vllm_tools.policy(FAMILY)
    check_sync(engine, model, 1)
    before = {url: held.group for url, held in engine._broadcast._servers.items()}
    vllm_tools.change_weights(model, 1)
    count = at_broadcast(monkeypatch, engine, others["second"], 5, others["second"].restart)
    check_sync(engine, model, 2)
    after = {url: held.group for url, held in engine._broadcast._servers.items()}
    assert count[0] > 12  # all of them again, after the 5
    assert after[server.url] is before[server.url] and after[others["second"].url] is not before[others["second"].url]
    engine.close()


def test_a_server_that_hangs_in_the_midst_of_a_transfer_ends_it_after_the_time_limit(server, monkeypatch):
    engine, model = connect(server.url, timeout=10.0), vllm_tools.policy(FAMILY)
    check_sync(engine, model, 1)
    at_broadcast(monkeypatch, engine, server, 5, lambda: os.killpg(server.process.pid, signal.SIGSTOP))
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match=f"{server.url}/.*has failed for 10 seconds"):
        engine.sync(model, 2)
    assert time.monotonic() - started < 90
    os.killpg(server.process.pid, signal.SIGCONT)
    check_sync(engine, model, 3)
    engine.close()


def test_a_trainer_that_fails_in_the_midst_of_a_transfer_leaves_a_server_that_takes_the_next(server, monkeypatch):
    """A part of a layer has been loaded then, of one that vLLM makes of several weights."""

    def broken(model):
        for name, tensor in named_weights(model):
            if name == "model.layers.1.self_attn.k_proj.weight":
                raise ValueError("a weight that cannot be merged")
            yield name, tensor

    monkeypatch.setattr(process_group, "BUCKET_BYTES", 1)
    first, model = connect(server.url), vllm_tools.policy(FAMILY)
    with monkeypatch.context() as patch:
        patch.setattr(broadcast, "named_weights", broken)
        with pytest.raises(ValueError, match="cannot be merged"):
            first.sync(model, 1)
    second = connect(server.url)
    check_sync(second, model, 1)
    check_sync(first, model, 2)
    first.close()
    second.close()


def test_weights_that_the_server_does_not_know_are_not_sent_again_and_again(server, monkeypatch):
    engine, model = connect(server.url), vllm_tools.policy(FAMILY)
    started = time.monotonic()
    with monkeypatch.context() as patch:
        unknown = [*named_weights(model), ("model.layers.0.nonsense.weight", torch.zeros(3))]
        patch.setattr(broadcast, "named_weights", lambda model: iter(unknown))
        with pytest.raises(RolloutServerError, match="collective_rpc failed: 500 .*nonsense"):
            engine.sync(model, 1)
    assert time.monotonic() - started < 90
    check_sync(engine, model, 2)
    engine.close()


def test_the_port_is_told_of_when_taken_and_free_again_after_the_run(server):
    port = free_port()
    engine = connect(server.url, vllm_group_port=port)
    with pytest.raises(ValueError, match=f"Port {port} cannot be used .* Set `vllm_group_port`"):
        connect(server.url, vllm_group_port=port)
    check_sync(engine, vllm_tools.policy(FAMILY), 1)
    engine.close()
    connect(server.url, vllm_group_port=port).close()


def test_on_a_cpu_weights_are_broadcast_only_when_asked_for(server):
    engine = connect(server.url, vllm_weight_transfer="auto")
    assert engine.transfer == "auto" and engine._broadcast is None
    engine.close()
