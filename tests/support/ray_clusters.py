"""Ray clusters of several nodes on this machine, and runs of the command line on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file

from online_dpo.quickstart import language
from online_dpo.quickstart.artifacts import write_prompts
from online_dpo.quickstart.models import build_policy_config, build_tokenizer, new_policy
from support.processes import environment

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
}


@contextmanager
def cluster(cpus: Sequence[int]) -> Iterator[object]:
    """A cluster with a node for each number of CPUs, in a folder with a short path, as the names of sockets ask for."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        with mock.patch.dict(os.environ, environment(**QUIET, RAY_TMPDIR=folder), clear=True):
            from ray.cluster_utils import Cluster

            made = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
            for count in cpus[1:]:
                made.add_node(num_cpus=count)
        try:
            yield made
        finally:
            made.shutdown()


def start(run_file: Path, address: str, *words: object) -> subprocess.Popen[str]:
    """`online-dpo ray` on a cluster."""
    command = [sys.executable, "-m", "online_dpo", "ray", str(run_file), "--ray.address", address, *map(str, words)]
    return subprocess.Popen(
        command, env=environment(**QUIET), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(run: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    """Exit code, output and errors of a run."""
    try:
        output, errors = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)
        output, errors = run.communicate(timeout=300)
        raise AssertionError(f"it has not ended in time:\n{output}\n{errors}") from None
    return run.returncode, output, errors


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def running(*words: str) -> list[int]:
    """The processes in whose command line all of these words stand."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if all(word in line for word in words) and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


FEEDBACK = '''
import os
import signal
from pathlib import Path

from online_dpo.quickstart.rubric import rubric_score

HERE = Path(__file__).parent
calls = 0


def once(name):
    """Whether the test wants this to happen, and it has not yet."""
    if not (HERE / f"wanted-{name}").exists():
        return False
    (HERE / f"wanted-{name}").rename(HERE / f"done-{name}")
    return True


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def server():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\\0")
        except OSError:  # it has ended
            continue
        if b"vllm.entrypoints.openai.api_server" in words and str(HERE).encode() in b" ".join(words):
            return int(file.parent.name)


def score(prompts, completions):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 4 and once("kill-trainer"):
        kill(os.getpid())
    is_second = (HERE / "done-kill-trainer").exists()
    if os.environ["RANK"] == "0" and calls == 3 and is_second and once("kill-worker"):  # Ray's, above the keeper
        kill(parent_of(os.getppid()))
    if os.environ["RANK"] == "1" and calls == 3 and is_second and once("kill-server"):
        kill(server())
    if os.environ["RANK"] == "1" and calls == 3 and once("terminate"):
        os.kill(int((HERE / "command.pid").read_text()), signal.SIGTERM)
    answers = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [score + len(set(text)) / 100 for score, text in zip(rubric_score(prompts, answers), answers, strict=True)]
'''
"""Scores of the quickstart's task, by processes that end others, or themselves, where a test has asked for it."""


def fill(folder: Path, **fields: object) -> Path:
    """The quickstart's task with a policy that has learned nothing. Returns the run file; ``fields`` are more of it."""
    requests = language.sample_requests(64, 0, "online")
    texts = [language.prompt_of(request) for request in requests]
    tokenizer = build_tokenizer(texts, 300)
    new_policy(build_policy_config(tokenizer, hidden=64, layers=2, heads=2)).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    write_prompts(folder / "prompts.jsonl", requests)
    (folder / "feedback.py").write_text(FEEDBACK)
    settings = dict(
        model_name_or_path="./policy",
        dataset_name="prompts.jsonl",
        reward_funcs=["feedback.py:score"],
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to="none",
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        max_steps=8,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        num_completions=4,
        max_new_tokens=8,
        max_length=128,
        gradient_checkpointing=False,
        **fields,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model."""
    return load_file(folder / "model.safetensors")
