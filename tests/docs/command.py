"""Stands on a page's path for `online-dpo`, `python`, `torchrun`, and for what is checked rather than run.

Imports little: it starts once for each command. Its words go to the warm process (`docs.warm`).
"""

import json
import os
import re
import signal
import socket
import sys
import tomllib
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
DONE, FAILED = "done", "failed"
"""What the process with a page's names answers to a block."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def ask(kind, words, streams=(0, 1, 2)):
    """A connection to a fork that runs these words, and the fork's number."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.environ["DOCS_WARM"])
    request = {"kind": kind, "words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    send(client, request, streams)
    return client, int(read_line(client))


def send(client, request, streams):
    """A line of JSON, the streams with its beginning."""
    data = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(client, [data], list(streams))
    client.sendall(data[sent:])


def read_line(client):
    data = b""
    while not data.endswith(b"\n"):
        byte = client.recv(1)
        if not byte:
            raise EOFError("the warm process has gone")
        data += byte
    return data.decode().strip()


def run(kind, words):
    """What the fork does. That it failed is written down: the shell does not ask those in its background."""

    def pass_on(number, frame):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # those that come early wait
    client, pid = ask(kind, words)
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(read_line(client))
    if code:
        with open(os.environ["DOCS_FAILED"], "a") as file:
            file.write(f"{kind} {' '.join(words)}: exit code {code}\n")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def run_dashboard(words):
    """Waits until it serves, asks for its first page, and ends it by Ctrl-C."""
    if "--port" not in words:
        words = [*words, "--port", "0"]
    reading, writing = os.pipe()
    client, pid = ask("online-dpo", [*words, "--no-browser"] if "--open" not in words else words, (0, writing, writing))
    os.close(writing)
    printed = b""
    while not (found := re.search(rb"(http://\S+)\s", printed)):
        data = os.read(reading, 4096)
        if not data:
            print(printed.decode())
            return int(read_line(client)) or 1
        printed += data
    print(printed.decode())
    page = urllib.request.build_opener(urllib.request.HTTPCookieProcessor()).open(found[1].decode())
    assert page.status == 200 and b"<html" in page.read(), found[1]
    os.kill(pid, signal.SIGINT)
    return int(read_line(client))


def check_pip(words):
    """Installing is not done here: what is named has to exist in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if words[:1] == ["freeze"]:
        return 0
    if words[:1] != ["install"]:
        return fail(f"pip {' '.join(words)}: mark the block, or add a rule to tests/docs/command.py")
    dependencies = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[^\w.-]", one)[0] for one in dependencies} | {"pip"}
    for word in words[1:]:
        if word.startswith("-") or word.endswith((".txt", "whl")):
            continue
        asked = re.fullmatch(r"(\.|[\w-]+)(?:\[([\w,-]+)\])?([<>=!~].*)?", word)
        if asked is None or asked[1] not in {".", "online-dpo", *names}:
            return fail(f"pip install {word}: neither this package nor one of its dependencies")
        if wrong := [
            extra
            for extra in (asked[2] or "").split(",")
            if extra and asked[1] in (".", "online-dpo") and extra not in project["optional-dependencies"]
        ]:
            return fail(f"pip install {word}: there is no extra {', '.join(wrong)}")
    return 0


def check_git(words):
    """Only a clone of this repository, whose files then lie where the page says."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    if words[:1] != ["clone"] or words[1].removesuffix(".git") != address:
        return fail(f"git {' '.join(words)}: only `git clone {address}` is known")
    folder = Path(words[2] if len(words) > 2 else "online-dpo")
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs"):
            (folder / entry.name).symlink_to(entry)
    return 0


def check_make(words):
    """Targets have to exist; CI runs those that it should."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    missing = [word for word in words if "=" not in word and word not in targets]
    return fail(f"make has no target {', '.join(missing)}") if missing else 0


def is_benchmark(words):
    """Scripts of benchmarks/ have tests of their own (tests/e2e/test_benchmarks.py): the file has to be there."""
    return bool(words) and words[0].startswith("benchmarks/")


def fail(problem):
    print(f"error: {problem}", file=sys.stderr)
    return 2


def main():
    name, words = sys.argv[1], sys.argv[2:]
    if name in CHECKS:
        return CHECKS[name](words)
    if name == "online-dpo" and words[:1] == ["dashboard"] and not {"-h", "--help"} & {*words}:
        return run_dashboard(words)
    if name == "python" and words[:2] == ["-m", "pip"]:
        return check_pip(words[2:])
    if name == "python" and is_benchmark(words):
        return 0 if (ROOT / words[0]).is_file() else fail(f"there is no {words[0]}")
    return run(name, words)


CHECKS = {"pip": check_pip, "git": check_git, "make": check_make}

if __name__ == "__main__":
    sys.exit(main())
