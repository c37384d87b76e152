"""The command lines of the processes of a run."""

from pathlib import Path

import pytest

from online_dpo.cli.serve import server_command
from online_dpo.launch.commands import serve_words, train_words
from online_dpo.launch.settings import RaySettings

LOCAL = dict(revision=None, trust_remote_code=False)


def test_ranks_get_the_words_of_the_command_the_servers_and_the_checkpoint():
    urls = ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]
    words = train_words(Path("/d/run.yaml"), ["--max_steps", "5"], urls, Path("/d/out/checkpoint-4"))
    assert words == [
        *("-m", "online_dpo", "train", "/d/run.yaml", "--max_steps", "5", "--use_vllm", "true", "--vllm_mode"),
        *("server", "--vllm_server_base_url", "http://10.0.0.1:8000,http://10.0.0.2:8000"),
        *("--resume_from_checkpoint", "/d/out/checkpoint-4"),
    ]


def test_without_servers_and_checkpoint_there_is_nothing_to_add():
    assert train_words(None, ["--beta", "0.1"], [], None) == ["-m", "online_dpo", "train", "--beta", "0.1"]


def test_a_server_splits_the_model_over_its_gpus_in_one_process_group():
    words = serve_words("/m", RaySettings(train_gpus=1, servers=1, gpus_per_server=4), "10.0.0.1", 8001, **LOCAL)
    assert words[2:] == [
        *("serve", "/m", "--host", "10.0.0.1", "--port", "8001", "--tensor-parallel-size", "4"),
        *("--", "--distributed-executor-backend", "mp"),
    ]


@pytest.mark.parametrize(
    "given", [["--data-parallel-size", 2], ["--data-parallel-size=2"], ["--data_parallel_size", 2]]
)
def test_copies_of_the_model_are_the_users_choice(given):
    settings = RaySettings(train_gpus=1, servers=1, gpus_per_server=2, server_args=given)
    assert "--tensor-parallel-size" not in serve_words("m", settings, "h", 1, **LOCAL)


def test_the_users_words_go_where_serve_reads_them(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    given = ["--max-model-len", 4096, "--lora-rank", 16, "--", "--enforce-eager"]
    settings = RaySettings(train_workers=1, servers=1, server_args=given)
    words = serve_words("owner/m", settings, "10.0.0.1", 8001, revision="v2", trust_remote_code=True)
    command = server_command(words[3:])
    for pair in (["--max-model-len", "4096"], ["--max-lora-rank", "16"], ["--revision", "v2"]):
        assert pair in [command[i : i + 2] for i in range(len(command))]
    assert {"--enforce-eager", "--trust-remote-code"} <= set(command)
