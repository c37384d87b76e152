"""One process that has imported all that pages use, and forks a child for each command of a page.

``python -m docs.warm SOCKET [NAME...]`` first makes the hub's models and datasets that have one of these names, and
what a page's folder begins with. A client connects, sends one line of JSON and its three standard streams, and gets
the child's number and, at its end, its exit code. When the client goes away, so does the child.
"""

from __future__ import annotations

import gc
import json
import os
import re
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from faults.zygote import MODULES as FOR_RUNS
from faults.zygote import end_interpreter
from support.hub import DATASETS, MODELS, PAIRRM, make_hub

PAGES = [
    "online_dpo.cli.doctor",
    "online_dpo.cli.eval",
    "online_dpo.cli.export",
    "online_dpo.cli.judge",
    "online_dpo.cli.quickstart",
    "online_dpo.cli.report",
    "online_dpo.doctor.examine",
    "online_dpo.quickstart.run",
    "datasets",
]
STEPS = 2
"""Optimizer steps of a training on a page."""
SMALL = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_new_tokens": 8,
    "use_cpu": "true",
    "report_to": "none",
}
"""What is appended to a command that trains, unless the page gives it there itself."""


def main() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1] + ".new")
    listener.listen(64)
    torch.set_num_threads(1)
    for name in [*FOR_RUNS, *PAGES]:
        import_module(name)
    from online_dpo.cli.runfile.schema import load_fields

    load_fields()
    known = [*MODELS, *DATASETS, PAIRRM]
    in_a_fork(lambda: make_hub(Path(sys.argv[1]).with_name("hub"), *(n for n in sys.argv[2:] if n in known)))
    in_a_fork(lambda: make_ground(Path(sys.argv[1]).with_name("ground")))
    gc.collect()
    gc.freeze()
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join(5.0)
    assert threading.active_count() == 1, threading.enumerate()
    os.rename(sys.argv[1] + ".new", sys.argv[1])  # from now on it can be connected to
    serve(listener)


def in_a_fork(work: Callable[[], None]) -> None:
    """What starts threads or computes gradients leaves this process as it is."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the page's folder could not be made"


def make_ground(folder: Path) -> None:
    """What each page's folder begins with."""
    from online_dpo.cli.main import main
    from online_dpo.quickstart.models import TINY
    from online_dpo.quickstart.run import run_quickstart

    folder.mkdir()
    os.chdir(folder)
    run_quickstart(Path("runs/quickstart"), size=TINY, max_steps=STEPS)
    text = Path("runs/quickstart/run.yaml").read_text()
    own = re.sub(r": start/", ": runs/quickstart/start/", text).replace("runs/quickstart_again", "outputs")
    Path("run.yaml").write_text(own)
    assert main(["export", "runs/quickstart", "--to", "pairs.jsonl"]) == 0


def serve(listener: socket.socket) -> None:
    clients: dict[socket.socket, int] = {}
    parent = os.getppid()
    while True:
        ready, _, _ = select.select([listener, *clients], [], [], 0.01)
        for one in ready:
            if one is listener:
                client, _ = listener.accept()
                clients[client] = start(client, [listener, *clients])
            elif has_gone(one):
                stop(clients.pop(one))
                one.close()
        for client, pid in list(clients.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del clients[client]
                tell(client, os.waitstatus_to_exitcode(status))
                client.close()
        if os.getppid() != parent:  # the tests were killed
            return


def has_gone(client: socket.socket) -> bool:
    """Whether a client has closed its end. What it sends is for its child: here it is neither taken nor waited for."""
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:  # the child was quicker
        return False


def tell(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it has gone
        client.sendall(f"{number}\n".encode())


def stop(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def start(client: socket.socket, others: list[socket.socket]) -> int:
    data, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        tell(client, pid)
        return pid
    code: Any = 1
    try:
        for other in others:
            other.close()
        request = json.loads(data)
        become(request, streams)
        code = KINDS[request["kind"]](request, client)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    os._exit(end_interpreter() or code or 0)


def become(request: dict[str, Any], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["online-dpo", *request["words"]]
    redirect_paid_judges(os.environ["DOCS_ENDPOINT"])


def redirect_paid_judges(url: str) -> None:
    """A judge without an address is asked here, not where it costs money."""
    from online_dpo.config import llm_judge

    made = llm_judge.JudgeSettings.__init__
    made.__defaults__ = tuple(url if value == llm_judge.OPENAI else value for value in made.__defaults__ or ())


def be_the_command(request: dict[str, Any], client: socket.socket) -> None:
    from online_dpo.cli.process import run

    words = request["words"]
    sys.argv = ["online-dpo", *with_small_settings(words)]
    if words[:1] == ["quickstart"]:
        from online_dpo.quickstart.models import TINY
        from online_dpo.quickstart.run import run_quickstart

        assert run_quickstart.__kwdefaults__
        run_quickstart.__kwdefaults__.update(size=TINY, max_steps=STEPS)
    run()


def with_small_settings(words: list[str]) -> list[str]:
    """The words of a command, followed by settings that keep it short where it trains."""
    if words[:1] != ["train"] or {"-h", "--help"} & {*words}:
        return words
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return [*words, *(part for name, value in SMALL.items() if name not in given for part in (f"--{name}", str(value)))]


def be_python(request: dict[str, Any], client: socket.socket) -> None:
    """``python FILE``, ``python -m MODULE`` and ``python -c CODE``."""
    words = request["words"]
    train_little()
    sys.path.insert(0, os.getcwd())
    if words[:2] == ["-m", "online_dpo"]:
        be_the_command({**request, "words": words[2:]}, client)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})  # noqa: S102
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def train_little() -> None:
    """Configurations that are made in Python from now on are small as well."""
    from online_dpo import OnlineDPOConfig

    made = OnlineDPOConfig.__post_init__

    def small(self: Any) -> None:
        self.max_steps = min(self.max_steps, STEPS) if self.max_steps > 0 else STEPS
        self.per_device_train_batch_size = min(self.per_device_train_batch_size, SMALL["per_device_train_batch_size"])
        self.use_cpu, self.report_to = True, "none"
        made(self)

    OnlineDPOConfig.__post_init__ = small


def be_torchrun(request: dict[str, Any], client: socket.socket) -> int:
    """Two processes at most, of this machine, forked instead of started; torchrun's own parser reads the words."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(request["words"])
    assert int(given.nnodes.split(":")[0]) == 1, "several machines: mark the block as not run"
    assert given.module, "torchrun -m online_dpo ..."
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        port = any_socket.getsockname()[1]
    count = min(int(given.nproc_per_node), 2)
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if not pids[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), GLOO_SOCKET_IFNAME="lo")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(count))
            return be_rank([given.training_script, *given.training_script_args], request, client)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return next((code for code in codes if code), 0)


def be_rank(words: list[str], request: dict[str, Any], client: socket.socket) -> int:
    be_python({**request, "words": ["-m", *words]}, client)
    return 0


def be_the_namespace(request: dict[str, Any], client: socket.socket) -> None:
    """The Python of a page: gets one block after the other and says of each whether it went through."""
    train_little()
    sys.path.insert(0, os.getcwd())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in client.makefile("r"):
        block = json.loads(line)
        try:
            source = "\n" * block["line"] + block["code"]
            exec(compile(source, block["page"], "exec"), namespace)  # noqa: S102
            answer = 0
        except BaseException:
            traceback.print_exc()
            answer = 1
        sys.stdout.flush()
        sys.stderr.flush()
        tell(client, answer)


def be_the_check(request: dict[str, Any], client: socket.socket) -> None:
    """``FILE``: everything that is checked of a run file before the run."""
    from online_dpo.cli.runfile.run_file import plan_run

    plan_run(Path(request["words"][0]), [], on_cluster=request["on_cluster"])


KINDS: dict[str, Callable[[dict[str, Any], socket.socket], Any]] = {
    "online-dpo": be_the_command,
    "python": be_python,
    "torchrun": be_torchrun,
    "namespace": be_the_namespace,
    "check": be_the_check,
}


if __name__ == "__main__":
    main()
