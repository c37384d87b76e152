"""The command line of the server that takes weights. Starts none."""

import os
import sys

import pytest

from online_dpo.cli import serve
from online_dpo.cli.main import main
from online_dpo.config import requirements
from online_dpo.rollout.vllm import worker


def test_the_command_line_of_the_server():
    command = serve.server_command(["org/model", "--port", "8001", "--dtype", "bfloat16", "--", "--enforce-eager"])
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"]
    assert command[5:9] == ["--worker-extension-cls", worker.EXTENSION, "--generation-config", "vllm"]
    assert command[9:] == ["--host", "127.0.0.1", "--port", "8001", "--dtype", "bfloat16", "--enforce-eager"]


@pytest.mark.parametrize("rank, started_for", [(1, "1"), (4, "8"), (16, "16"), (300, "320")])
def test_a_server_for_adapters(rank, started_for):
    command = serve.server_command(["org/model", "--lora-rank", str(rank)])
    assert command[-7:] == ["--enable-lora", "--max-lora-rank", started_for, "--max-loras", "1", "--max-cpu-loras", "2"]


def test_the_process_becomes_the_server_with_the_addresses_for_weights_open(monkeypatch):
    calls = []
    monkeypatch.setattr(requirements, "installed", lambda module: True)
    monkeypatch.setattr(os, "execvpe", lambda *a: calls.append(a))
    main(["serve", "org/model", "--tensor-parallel-size", "2"])
    [(program, command, environment)] = calls
    assert program == sys.executable and command[-2:] == ["--dtype", "auto"]
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "--enable-lora" not in command


def test_without_vllm_there_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "installed", lambda module: False)
    assert main(["serve", "org/model"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["serve"], ["serve", "org/model", "--prot", "3"]])
def test_wrong_words_are_told_of(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "See: online-dpo serve --help" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--help"])
    assert stop.value.code == 0 and "--tensor-parallel-size" in capsys.readouterr().out
