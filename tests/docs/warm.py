"""One process that has imported all that pages use, and forks a child for each command of a page.

``python -m docs.warm SOCKET [NAME...]`` first makes the hub's models and datasets that have one of these names, and
what a page's folder begins with.

A client connects, and this process forks at once: it reads nothing itself, so that no client can hold it up. It writes
the child's number to the client. The child reads one line of JSON with three standard streams from the client, and does
what that asks. When the child ends, whatever is left of its group is killed, and the client gets the exit code. When
the client goes away, the child and its group are killed. Children end with this process, and this process with the one
that started it.
"""

from __future__ import annotations

import ctypes
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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from docs.command import DONE, FAILED
from faults.zygote import MODULES as FOR_RUNS
from faults.zygote import end_interpreter
from support.hub import DATASETS, MODELS, PAIRRM, make_hub
from support.processes import free_port

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
PR_SET_PDEATHSIG = 1


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
        thread.join(60.0)
    assert threading.active_count() == 1, threading.enumerate()  # a fork has one thread alone
    os.rename(sys.argv[1] + ".new", sys.argv[1])  # from now on it can be connected to
    serve(listener)


def fork() -> int:
    """``os.fork``, but the child ends when this process does."""
    parent, pid = os.getpid(), os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os._exit(1)
        # torch makes its pool anew after a fork: here, before two threads do so at once, which fails
        torch.set_num_threads(1)
    return pid


def in_a_fork(work: Callable[[], object]) -> None:
    """What starts threads or computes gradients leaves this process as it is."""
    pid = fork()
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
    from online_dpo.quickstart.models import TINY
    from online_dpo.quickstart.run import run_quickstart

    folder.mkdir()
    os.chdir(folder)
    run_quickstart(Path("runs/quickstart"), size=TINY, max_steps=STEPS)
    text = Path("runs/quickstart/run.yaml").read_text()
    own = re.sub(r": start/", ": runs/quickstart/start/", text).replace("runs/quickstart_again", "outputs")
    Path("run.yaml").write_text(own)


@dataclass(frozen=True)
class Fork:
    """A child that works for a client."""

    pid: int
    client: socket.socket

    def is_over(self) -> bool:
        """Whether it has ended. Its number is still its own, until `end`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> None:
        """Kills what there is of its group, and tells the client how it ended."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made a group yet
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        tell(self.client, os.waitstatus_to_exitcode(status))
        self.client.close()


def serve(listener: socket.socket) -> None:
    """Forks for each client, and reads from none."""
    forks: list[Fork] = []
    parent = os.getppid()
    while os.getppid() == parent:  # else the tests were killed
        changes = select.poll()
        changes.register(listener, select.POLLIN)
        for one in forks:
            changes.register(one.client, select.POLLRDHUP)  # not what it sends: that is for its child
        ready = {number for number, _ in changes.poll(10 if forks else 1000)}
        for one in [one for one in forks if one.client.fileno() in ready or one.is_over()]:
            forks.remove(one)
            one.end()
        if listener.fileno() in ready:
            client, _ = listener.accept()
            forks.append(start(client, [listener, *(one.client for one in forks)]))


def tell(client: socket.socket, word: int | str) -> None:
    with suppress(OSError):  # it has gone
        client.sendall(f"{word}\n".encode())


def start(client: socket.socket, others: list[socket.socket]) -> Fork:
    pid = fork()
    if pid:
        tell(client, pid)
        return Fork(pid, client)
    code: Any = 1
    try:
        os.setsid()
        for other in others:
            other.close()
        request = receive(client)
        become(request)
        code = KINDS[request["kind"]](request, client)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    os._exit(end_interpreter() or code or 0)


def receive(client: socket.socket) -> dict[str, Any]:
    """A client's request, whose streams become those of this process."""
    data, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    while not data.endswith(b"\n"):
        more = client.recv(1 << 20)
        if not more:
            raise EOFError("the client has gone")
        data += more
    return json.loads(data)


def become(request: dict[str, Any]) -> None:
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
    """Two processes at most, forked instead of started; torchrun's own parser reads the words.

    When one fails, the others are killed: they would wait for it.
    """
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(request["words"])
    assert given.module, "torchrun -m online_dpo ..."
    nodes, count = int(given.nnodes.split(":")[0]), min(int(given.nproc_per_node), 2)
    assert nodes == 1 or given.master_addr == "127.0.0.1", "several machines: mark the block as not run"
    port = given.master_port if nodes > 1 else free_port()
    shared = dict(WORLD_SIZE=nodes * count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in shared.items()}, GLOO_SOCKET_IFNAME="lo")
    pids = set()
    for rank in range(count):
        pid = fork()
        if not pid:
            os.environ.update(RANK=str(given.node_rank * count + rank), LOCAL_RANK=str(rank))
            return be_rank([given.training_script, *given.training_script_args], request, client)
        pids.add(pid)
    code = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if not code and (code := os.waitstatus_to_exitcode(status)):
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def be_rank(words: list[str], request: dict[str, Any], client: socket.socket) -> int:
    be_python({**request, "words": ["-m", *words]}, client)
    return 0


def be_the_namespace(request: dict[str, Any], client: socket.socket) -> None:
    """The Python of a page: gets one block after the other, and says of each ``done`` or ``failed``."""
    train_little()
    sys.path.insert(0, os.getcwd())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in client.makefile("r"):
        block = json.loads(line)
        try:
            source = "\n" * block["line"] + block["code"]
            exec(compile(source, block["page"], "exec"), namespace)  # noqa: S102
            answer = DONE
        except BaseException:
            traceback.print_exc()
            answer = FAILED
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
