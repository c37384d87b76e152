"""Servers that fail, hang, restart, or hold other weights than ours."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from online_dpo.errors import RolloutServerError
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import tiny, vllm_tools
from support.processes import free_port

FAMILY = "qwen2-tied"
KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
LENGTHS = (3, 40, 1, 7, 70)


@pytest.fixture
def model():
    return vllm_tools.policy(FAMILY)


def connect(*urls, timeout=120.0, **fields):
    return VLLMServerEngine(urls, tiny.tokenizer(), vllm_tools.arguments(vllm_server_timeout=timeout, **fields))


def sample(engine, prompts=None):
    return engine.generate(prompts or tiny.prompts(LENGTHS), 3, PARAMS, KEY)


def versions(groups):
    return {c.policy_version for g in groups for c in g.completions}


@pytest.mark.parametrize("transfer", ["file", "http"])
def test_weights_arrive_as_files_or_over_http(server, model, transfer, monkeypatch):
    monkeypatch.setattr("online_dpo.rollout.vllm.server_engine.CHUNK_BYTES", 50_000)
    monkeypatch.setattr("online_dpo.rollout.weights.export.SHARD_BYTES", 200_000)
    engine = connect(server.url, vllm_weight_transfer=transfer)
    for version in (1, 2):
        vllm_tools.change_weights(model, version)
        engine.sync(model, version)
        groups = sample(engine)
        assert vllm_tools.largest_error(model, groups) < 1e-4 and versions(groups) == {version}
    engine.close()


def test_a_server_that_does_not_see_our_files_gets_bytes(server, model, monkeypatch):
    with vllm_tools.Proxy(server.url) as proxy:
        engine = connect(proxy.url)
        rpc = VLLMClient.rpc

        def elsewhere(client, method, *arguments):
            return ["no"] if method == "online_dpo_sees" else rpc(client, method, *arguments)

        monkeypatch.setattr(VLLMClient, "rpc", elsewhere)
        engine.sync(model, 1)
        assert vllm_tools.largest_error(model, sample(engine)) < 1e-4
        engine.transfer = "file"
        with pytest.raises(RolloutServerError, match="does not see the folder"):
            engine.sync(model, 2)
        engine.close()


def test_errors_and_lost_connections_are_tried_again(server, model):
    failures = {
        "/collective_rpc": 2,
        "/pause?mode=abort&clear_cache=false": 1,
        "/reset_prefix_cache": 1,
        "/v1/completions": 9,
    }

    def fault(path):
        failures[path] = failures.get(path, 0) - 1
        return 503 if failures[path] >= 0 else None

    expected = connect(server.url)
    expected.sync(model, 1)
    with vllm_tools.Proxy(server.url, fault) as proxy:
        engine = connect(proxy.url)
        engine.sync(model, 1)
        assert sample(engine) == sample(expected)
        assert all(left < 0 for left in failures.values())
        engine.close()
    expected.close()


def test_a_request_that_hangs_is_tried_again(server, model):
    hang = [True]

    def fault(path):
        if path == "/v1/completions" and hang:
            hang.pop()
            time.sleep(25)

    with vllm_tools.Proxy(server.url, fault) as proxy:
        engine = connect(proxy.url, timeout=12.0)
        engine.sync(model, 1)
        assert vllm_tools.largest_error(model, sample(engine)) < 1e-4 and not hang
        engine.close()


def test_a_server_that_keeps_failing_is_named_with_the_cause(server, model):
    broken = []
    with vllm_tools.Proxy(server.url, lambda path: 500 if path in broken else None) as proxy:
        engine = connect(proxy.url, timeout=5.0)
        engine.sync(model, 1)
        broken.append("/v1/completions")
        started = time.monotonic()
        with pytest.raises(RolloutServerError, match=f"{proxy.url}/v1/completions .* 500 .*broken on purpose"):
            sample(engine)
        assert time.monotonic() - started < 90
        engine.close()


def test_no_server_at_all():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RolloutServerError, match=f"{url}/health has failed for 1 seconds.*refused"):
        connect(url, timeout=1.0)
    with pytest.raises(ValueError, match="begins with http"):
        connect("localhost:8000")


def test_requests_that_the_server_refuses_are_not_repeated(server, model):
    engine = connect(server.url)
    engine.sync(model, 1)
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match="/v1/completions failed: 400"):
        sample(engine, tiny.prompts([vllm_tools.MAX_LENGTH + 5]))
    assert time.monotonic() - started < 90
    engine.close()


@pytest.mark.parametrize("size", [48, 192])
def test_a_server_of_another_model_is_refused_before_its_weights_are_touched(server, model, size):
    engine = connect(server.url)
    engine.sync(model, 1)
    expected = sample(engine)
    with pytest.raises(ValueError, match=f"{server.url} serves another.* intermediate_size 96 there and {size} here"):
        engine.sync(vllm_tools.policy(FAMILY, intermediate_size=size), 2)
    assert sample(engine) == expected
    engine.close()


def test_prompts_are_spread_over_servers_and_all_have_the_weights(server, model):
    with vllm_tools.Proxy(server.url) as first, vllm_tools.Proxy(server.url) as second:
        engine = connect(first.url, second.url)
        engine.sync(model, 1)
        groups = sample(engine)
        assert [p.paths.count("/v1/completions") for p in (first, second)] == [9, 6]
        assert [g.prompt for g in groups] == tiny.prompts(LENGTHS)
        assert vllm_tools.largest_error(model, groups) < 1e-4
        engine.close()


def test_weights_that_another_run_sent_are_replaced(server, model):
    ours, other = connect(server.url), connect(server.url)
    ours.sync(model, 1)
    expected = sample(ours)
    other.sync(vllm_tools.policy(FAMILY, seed=8), 1)
    assert sample(ours) == expected
    ours.close()
    other.close()


def test_a_run_that_keeps_replacing_our_weights_is_told_of(server, model):
    """Its weights arrive between our last request and our second look."""
    other = connect(server.url)
    other.sync(vllm_tools.policy(FAMILY, seed=8), 1)
    looks = [0]

    def fault(path):
        if path == "/v1/completions":
            looks[0] += 1
            if looks[0] % 15 == 0:
                other._push(other._clients[0])

    with vllm_tools.Proxy(server.url, fault) as proxy:
        engine = connect(proxy.url)
        engine.sync(model, 1)
        with pytest.raises(RolloutServerError, match=f"{proxy.url} lost the weights 5 times"):
            sample(engine)
        engine.close()
    other.close()


def test_new_weights_wait_until_completions_of_the_old_ones_are_sampled(server, model):
    """As with steps that are sampled ahead: `generate` runs in a thread, the trainer steps and syncs."""
    first_request = threading.Event()

    def fault(path):
        if path == "/v1/completions":
            first_request.set()
            time.sleep(0.3)

    new = vllm_tools.policy(FAMILY, seed=8)
    with vllm_tools.Proxy(server.url, fault) as proxy, ThreadPoolExecutor(1) as thread:
        engine = connect(proxy.url)
        engine.sync(model, 1)
        running = thread.submit(sample, engine)
        first_request.wait()
        engine.sync(new, 2)
        assert running.done()
        old_groups, new_groups = running.result(), sample(engine)
        assert versions(old_groups) == {1} and vllm_tools.largest_error(model, old_groups) < 1e-4
        assert versions(new_groups) == {2} and vllm_tools.largest_error(new, new_groups) < 1e-4
        engine.close()


@pytest.mark.slow
def test_after_a_restart_between_two_calls_no_completion_is_of_the_old_weights(server, model):
    engine = connect(server.url)
    engine.sync(model, 4)
    before = sample(engine)
    server.restart()
    after = sample(engine)
    assert after == before and versions(after) == {4}
    assert vllm_tools.largest_error(model, after) < 1e-4
    vllm_tools.change_weights(model, 0)
    server.restart()
    engine.sync(model, 5)
    assert vllm_tools.largest_error(model, sample(engine)) < 1e-4
    engine.close()


@pytest.mark.slow
def test_after_a_restart_in_the_midst_of_a_call_what_was_sampled_since_is_sampled_again(server, model):
    """Half of the requests are answered, then the server is lost; the rest meets one that has its first weights."""
    count, lock = [0], threading.Lock()

    def fault(path):
        with lock:  # what comes meanwhile waits as well
            count[0] += path == "/v1/completions"
            if count[0] == 7:
                count[0] += 1
                server.restart()

    direct = connect(server.url)
    direct.sync(model, 1)
    expected = sample(direct)
    with vllm_tools.Proxy(server.url, fault) as proxy:
        engine = connect(proxy.url)
        engine.sync(model, 1)
        groups = sample(engine)
        assert count[0] >= 2 * 15
        engine.close()
    assert groups == expected
    assert vllm_tools.largest_error(model, groups) < 1e-4
    direct.close()


@pytest.mark.slow
def test_a_tied_head_that_the_server_has_untied_is_tied_again(tmp_path):
    """A checkpoint of a tied model may hold a head that differs; vLLM then keeps the two apart."""
    from safetensors.torch import load_file, save_file

    class Untied(vllm_tools.ServerProcess):
        def start(self):
            path = self.model / "model.safetensors"
            weights = load_file(path)
            weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
            save_file(weights, path, metadata={"format": "pt"})
            super().start()

    process = Untied(FAMILY, tmp_path)
    try:
        model, engine = vllm_tools.policy(FAMILY), connect(process.url)
        for version in (1, 2):
            vllm_tools.change_weights(model, version)
            engine.sync(model, version)
            assert vllm_tools.largest_error(model, sample(engine)) < 1e-4
        engine.close()
    finally:
        process.kill()
