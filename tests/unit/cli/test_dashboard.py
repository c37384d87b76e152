"""``online-dpo dashboard``: wrong words are told in a line, and the server starts, answers and ends."""

import http.client
import re
import signal
import socket
import subprocess
import sys

import pytest

from online_dpo.cli.main import main


def test_wrong_words_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    cases = {
        (): "there is no folder runs",
        ("none",): "there is no folder none",
        ("file",): "file is a file",
        (".", "--port", "70000"): "from 0 to 65535",
        (".", "--port", str(port)): f"port {port} is in use",
        (".", "--host", "203.0.113.7", "--port", "0"): "no such address",
        (".", "--host", "no such host", "--port", "0"): "no such address",
    }
    for words, expected in cases.items():
        assert main(["dashboard", *words]) == 2, words
        errors = capsys.readouterr().err
        assert expected in errors and errors.startswith("error: ") and errors.count("\n") == 1, errors
    taken.close()


def test_unknown_options_have_hints(capsys):
    with pytest.raises(SystemExit):
        main(["dashboard", "--prot", "1"])
    assert "Did you mean `port`?" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_serves_until_a_signal(tmp_path, number, code):
    words = [sys.executable, "-m", "online_dpo", "dashboard", str(tmp_path), "--port", "0", "--no-browser"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port, token = re.search(r"127\.0\.0\.1:(\d+)/\?token=(\S+)", process.stdout.readline()).groups()
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=300)
    connection.request("GET", "/runs", headers={"Cookie": f"online_dpo_{port}={token}"})
    answer = connection.getresponse()
    assert answer.status == 200 and str(tmp_path) in answer.read().decode()
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert errors.strip() == ("" if code == 0 else "Stopped by SIGTERM.")


def test_it_imports_neither_torch_nor_transformers():
    code = "import sys, online_dpo.dashboard.server; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
