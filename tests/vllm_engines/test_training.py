"""Training runs that sample with a real vLLM: in process, and from a server that dies in the middle."""

import pytest
from transformers import TrainerCallback

from online_dpo.errors import OutOfSyncError, RolloutServerError
from support import vllm_tools
from support.vllm_training import RestartServer, check, train

FAMILY = "qwen2-tied"


@pytest.fixture
def served(server):
    return dict(vllm_mode="server", vllm_server_base_url=server.url)


@pytest.mark.parametrize("lora", [False, True])
def test_every_step_is_sampled_from_the_latest_weights(tmp_path, served, lora):
    model = vllm_tools.lora_policy(FAMILY) if lora else None
    check(train(tmp_path, model=model, sync_check_steps=1, **served))


def test_xpo_samples_the_policy_there_and_the_reference_here(tmp_path, served):
    log = train(tmp_path, method="xpo", sync_check_steps=1, **served)
    check(log)
    assert all(entry["opponent/mean_length"] > 0 and 0 <= entry["opponent/win_rate"] <= 1 for entry in log)


@pytest.mark.parametrize("max_staleness, transfer", [(0, "auto"), pytest.param(1, "broadcast", marks=pytest.mark.slow)])
def test_a_server_that_dies_in_the_middle_of_a_run_is_waited_for(tmp_path, server, served, max_staleness, transfer):
    """It comes back with the weights that it was first started with, and is given the latest before it samples; with
    ``max_staleness``, those of a step that has been trained beyond meanwhile.
    """
    served |= dict(max_staleness=max_staleness, vllm_weight_transfer=transfer, vllm_group_port=0)
    log = train(tmp_path, callbacks=[RestartServer(server)], **served)
    check(log, staleness=[0, 1] * 3 if max_staleness else None)  # two steps an epoch


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_prompts_without_a_pair_are_answered_again_from_the_same_weights(tmp_path, served, max_staleness):
    log = train(tmp_path, max_staleness=max_staleness, resample_rounds=2, **served)
    check(log, staleness=[0, 1] * 3 if max_staleness else None)
    assert sum(entry["resample/rescued"] for entry in log) > 0


def test_a_server_that_stays_away_ends_the_run_with_its_address(tmp_path, server, served):
    class Kill(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            server.kill()

    with pytest.raises(RolloutServerError, match=server.url):
        train(tmp_path, callbacks=[Kill()], vllm_server_timeout=10.0, **served)
    assert (tmp_path / "checkpoint-1").is_dir()
    with pytest.raises(RolloutServerError, match=server.url):  # found before a model is loaded
        train(tmp_path, model="a/model-that-does-not-exist", vllm_server_timeout=1.0, **served)
    server.start()


@pytest.mark.slow
def test_a_server_that_forgets_to_load_is_found(tmp_path, served):
    def forget(made):
        sync = made.sampler.engine.sync

        def only_once(model, version):
            if version == 0:
                sync(model, version)
            made.sampler.engine._version = version

        made.sampler.engine.sync = only_once

    with pytest.raises(OutOfSyncError, match="After the weights of step 2"):
        train(tmp_path, prepare=forget, sync_check_steps=2, **served)


def test_in_process(tmp_path, monkeypatch):
    from online_dpo.rollout.vllm import colocated_engine

    options = colocated_engine.engine_options
    monkeypatch.setattr(
        colocated_engine, "engine_options", lambda *given: {**options(*given), "enforce_eager": True, "block_size": 32}
    )
    engines = []
    check(train(tmp_path, prepare=lambda made: engines.append(made.sampler.engine), sync_check_steps=1))
    engines[0].close()
