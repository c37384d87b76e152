"""The command line of the server that takes weights. Starts none."""

import os
import sys

import pytest

from online_dpo.cli import serve
from online_dpo.cli.main import main
from online_dpo.config import requirements
from online_dpo.rollout.vllm import key, worker


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


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


HOSTS = [
    ["--host", "0.0.0.0"],
    ["--host", "10.0.0.7"],
    ["--host", "::"],
    ["--host", "gpu-1"],
    ["--", "--host", "0.0.0.0"],
    ["--", "--host=0.0.0.0"],
    ["--host", ""],
]


@pytest.mark.parametrize("words", HOSTS)
def test_a_server_for_other_machines_needs_a_key(words, capsys):
    assert main(["serve", "org/model", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: Everybody who reaches ") and err.count("\n") == 1
    assert "VLLM_API_KEY" in err and "`--without-key`" in err


@pytest.mark.parametrize("words", HOSTS)
def test_with_a_key_the_server_asks_for_it_on_every_path(words, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    command = serve.server_command(["org/model", *words])
    assert command[command.index("--middleware") + 1] == key.MIDDLEWARE == serve.KEY_MIDDLEWARE
    assert "sk-1" not in command and not capsys.readouterr().err
    assert key.VARIABLE == serve.KEY_VARIABLE


def test_a_server_without_a_key_is_possible_and_warned_of(capsys):
    command = serve.server_command(["org/model", "--host", "10.0.0.7", "--without-key"])
    assert "--middleware" not in command and command[-3:] == ["8000", "--dtype", "auto"]
    assert capsys.readouterr().err.startswith("warning: everybody who reaches 10.0.0.7:8000 can run code")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_for_this_machine_needs_no_key(host, capsys):
    assert "--middleware" not in serve.server_command(["org/model", "--host", host])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("words", [["--api-key", "sk-1"], ["--api-key=sk-1"], ["--api_key", "sk-1"]])
def test_a_key_on_the_command_line_is_refused_without_showing_it(words, capsys):
    assert main(["serve", "org/model", "--", *words]) == 2
    err = capsys.readouterr().err
    assert "VLLM_API_KEY" in err and "sk-1" not in err


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", "sk 1\nx")
    assert main(["serve", "org/model"]) == 2
    err = capsys.readouterr().err
    assert "VLLM_API_KEY" in err and "sk 1" not in err
