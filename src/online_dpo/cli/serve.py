"""``online-dpo serve``: a vLLM server that takes the trainer's weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.config.requirements import FLAGS

EXTENSION = "online_dpo.rollout.vllm.worker.WeightUpdates"
PASSED_ON = {
    "--host": (str, "address to listen on; anybody who can reach the server can replace its weights"),
    "--port": (int, "port to listen on"),
    "--tensor-parallel-size": (int, "GPUs over which one copy of the model is split"),
    "--data-parallel-size": (int, "copies of the model"),
    "--dtype": (str, "type of weights and activations, such as bfloat16; `auto` takes the model's"),
    "--gpu-memory-utilization": (float, "share of each GPU's memory that vLLM uses"),
    "--max-model-len": (int, "longest prompt plus completion, in tokens"),
    "--max-num-seqs": (int, "most completions decoded at the same time"),
}
LORA_RANK = "--lora-rank"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM supports
CALLED_HERE = {
    "tp": "tensor_parallel_size",
    "dp": "data_parallel_size",
    "max_length": "max_model_len",
    "max_lora_rank": "lora_rank",
}
DEFAULTS = {"--host": "127.0.0.1", "--port": 8000, "--dtype": "auto"}


def serve(words: Sequence[str]) -> int:
    """Replace this process by the server. Returns (the exit code 2) only if the server cannot be started."""
    command = server_command(words)
    if FLAGS["use_vllm"].missing:
        print(f"error: vLLM is not installed here. Install it with: {FLAGS['use_vllm'].install}", file=sys.stderr)
        return 2
    try:
        _replace_process(command)
    except OSError as error:
        print(f"error: the server could not be started: {error}", file=sys.stderr)
        return 2


def server_command(words: Sequence[str]) -> list[str]:
    """The command line of vLLM's server. Words after ``--`` are passed on unchanged.

    The server uses vLLM's own sampling defaults, not those in the model folder, so that only the trainer decides where
    a completion ends.
    """
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    arguments = vars(_parser().parse_args(with_hyphens(words[:cut])))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments["model"]]
    command += ["--worker-extension-cls", EXTENSION, "--generation-config", "vllm"]
    for option in PASSED_ON:
        value = arguments[option.lstrip("-").replace("-", "_")]
        if value is not None:
            command += [option, str(value)]
    if arguments["lora_rank"] is not None:
        # One adapter is in use, and the next one may be loaded before the first is removed.
        rank = str(next((known for known in LORA_RANKS if known >= arguments["lora_rank"]), arguments["lora_rank"]))
        command += ["--enable-lora", "--max-lora-rank", rank, "--max-loras", "1", "--max-cpu-loras", "2"]
    return command + words[cut + 1 :]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        unknown=" Options of `vllm serve` go after `--`, such as `-- --enforce-eager`.",
        called_here=CALLED_HERE,
        prog="online-dpo serve",
        description="Start a vLLM server from which a trainer with `engine: vllm_server` samples.",
        epilog="Other options of `vllm serve` may follow after `--`, such as `-- --enforce-eager`.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the policy, as in the run file")
    for option, (kind, text) in PASSED_ON.items():
        default = DEFAULTS.get(option)
        shown = "vLLM's" if default is None else "%(default)s"
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {shown})")
    parser.add_argument(
        LORA_RANK,
        type=int,
        help="receive LoRA adapters of up to this rank instead of all weights: for a policy trained with an adapter",
    )
    return parser


def _replace_process(command: list[str]) -> NoReturn:
    """Run a command in place of this process, with the variables that enable weight updates and adapter loading."""
    enabled = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    os.execvpe(command[0], command, {**os.environ, **enabled})
