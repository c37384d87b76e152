"""Predictions of `scale.py` against real runs: 1 and 2 trainers, 1 and 2 vLLM servers, in turn and overlapping.

    python benchmarks/scale_check.py --json benchmarks/results/scale-cpu.json     10 minutes on an idle machine

Each process and each server has one thread, as a stand-in for one GPU. Two of them on two cores share what cores share
(memory, caches, whatever else runs), and overlapping ones compete: `cores` of the model is that limit. The first
prediction knows one run alone (1 trainer, 1 server); the second also those with 2 trainers and with 2 servers.
Needs vLLM in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import describe_machine, versions
from scale import Run, Step, learn, run_of
from workloads import EOS, FIRST_WORD, PAD, Shape, make_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig

SHAPE = Shape(384, 6, 6, 2, 1056, 8000, positions=512)  # heads of 64: vLLM's CPU attention knows them
PROMPTS, COMPLETIONS, STEPS, NEW_TOKENS = 8, 4, 8, 32
CASES = ((1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 1, 1), (2, 2, 1))
"""Trainers, servers, ``max_staleness``."""
KNOWN = CASES[:3]
SKIP = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
REWARD = """
def small_words(completions, **_):
    return [float(sum(int(word[1:]) % 7 for word in text.split() if word[1:].isdigit())) for text in completions]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config_of(shape: Shape) -> LlamaConfig:
    """A Llama: the tokenizer of a Qwen2 folder is loaded as Qwen2's own, which knows none of the words here."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def prepare(folder: Path) -> None:
    """Writes policy, prompts and reward function."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(0)
    LlamaForCausalLM(config_of(SHAPE)).save_pretrained(folder / "policy")
    make_tokenizer(SHAPE).save_pretrained(folder / "policy")
    rng = random.Random(0)
    prompts = [" ".join(f"w{rng.randrange(FIRST_WORD, SHAPE.vocabulary)}" for _ in range(24)) for _ in range(512)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    (folder / "reward.py").write_text(REWARD)


def start_server(folder: Path, number: int) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a server on a core of its own, as far as there are enough."""
    port, cores = free_port(), sorted(os.sched_getaffinity(0))
    own = {"VLLM_CPU_OMP_THREADS_BIND": str(cores[-1 - number % len(cores)])}
    options = ["--port", str(port), "--dtype", "float32", "--max-model-len", "96", "--", "--enforce-eager"]
    with (folder / f"server-{number}.log").open("wb") as log:
        command = [sys.executable, "-m", "online_dpo", "serve", str(folder / "policy"), *options]
        environment = {**os.environ, **ENVIRONMENT, **own}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


def wait_for(process: subprocess.Popen[bytes], url: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"error: the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"error: {url} did not answer within {seconds:.0f} s")


def measure(folder: Path, urls: list[str], trainers: int, servers: int, staleness: int) -> Run:
    """Trains, and returns the seconds of its steps."""
    out = folder / f"run-{trainers}-{servers}-{staleness}"
    fields: dict[str, Any] = dict(
        model_name_or_path=str(folder / "policy"),
        dataset_name=str(folder / "data.jsonl"),
        reward_funcs=f"{folder / 'reward.py'}:small_words",
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        max_steps=STEPS + SKIP,
        save_steps=STEPS + SKIP,
        logging_steps=1,
        per_device_train_batch_size=PROMPTS // trainers,
        num_completions=COMPLETIONS,
        max_new_tokens=NEW_TOKENS,
        max_length=96,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=",".join(urls[:servers]),
        max_staleness=staleness,
    )
    (folder / f"{out.name}.yaml").write_text(json.dumps(fields))  # JSON is YAML
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(trainers), "--master_port", str(free_port())]
    launch = torchrun if trainers > 1 else []
    command = [sys.executable, *launch, "-m", "online_dpo", "train", str(folder / f"{out.name}.yaml")]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"error: training ended with status {done.returncode}\n{done.stderr[-3000:]}")
    state = json.loads((out / f"checkpoint-{STEPS + SKIP}" / "trainer_state.json").read_text())
    return run_of(state["log_history"], trainers, servers, staleness, SKIP)


def compare(run: Run, models: dict[str, Step], cores: int) -> dict[str, Any]:
    """What was predicted for a run, and what was measured."""
    predicted = {
        name: round(step.seconds(run.trainers, run.servers, run.staleness, cores), 3) for name, step in models.items()
    }
    return {
        "trainers": run.trainers,
        "servers": run.servers,
        "max_staleness": run.staleness,
        "measured": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "predicted": predicted,
        "predicted / measured": {name: round(p / run.seconds["all"], 2) for name, p in predicted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="of each; the fastest one counts")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end too
    cores = len(os.sched_getaffinity(0))
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        prepare(folder)
        load_before = os.getloadavg()[0]
        try:
            urls = []
            for number in range(max(servers for _, servers, _ in CASES)):
                process, url = start_server(folder, number)
                started.append(process)
                wait_for(process, url)
                urls.append(url)
            measured: dict[tuple[int, int, int], list[Run]] = {case: [] for case in CASES}
            for _ in range(args.repetitions):  # in turn, so that a busy minute does not hit one case alone
                for case in CASES:
                    measured[case].append(measure(folder, urls, *case))
                    print(measured[case][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
    runs = {case: min(several, key=lambda run: run.seconds["all"]) for case, several in measured.items()}
    models = {
        "from one run": learn([runs[CASES[0]]], COMPLETIONS),
        "from three runs": learn([runs[case] for case in KNOWN], COMPLETIONS),
    }
    rows = [compare(run, models, cores) for run in runs.values()]
    print("| trainers | servers | max_staleness | measured, s | from one run | from three runs |")
    print("|---:" * 6 + "|")
    for row in rows:
        numbers = [row["trainers"], row["servers"], row["max_staleness"], row["measured"]["all"]]
        print("| " + " | ".join(map(str, [*numbers, *row["predicted"].values()])) + " |")
    if args.json is not None:
        result = {
            "command": " ".join(["python", "benchmarks/scale_check.py", *sys.argv[1:]]),
            "machine": describe_machine("cpu", 1),
            "cores": cores,
            "load_before": round(load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "versions": {**versions(), "vllm": version(packages_distributions()["vllm"][0])},
            "workload": {"prompts": PROMPTS, "completions": COMPLETIONS, "new_tokens": NEW_TOKENS, "steps": STEPS},
            "model": vars(SHAPE),
            "runs": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
