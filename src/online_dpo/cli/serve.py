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
    "--host": (str, "address to listen on; the server lets anybody who reaches it replace its weights"),
    "--port": (int, "port to listen on"),
    "--tensor-parallel-size": (int, "GPUs that one copy of the model is spread over"),
    "--data-parallel-size": (int, "copies of the model"),
    "--dtype": (str, "type of weights and activations, such as bfloat16; `auto` takes the model's"),
    "--gpu-memory-utilization": (float, "share of each GPU's memory that vLLM takes"),
    "--max-model-len": (int, "longest prompt plus completion, in tokens"),
    "--max-num-seqs": (int, "most completions decoded at the same time"),
}
LORA_RANK = "--lora-rank"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM can be started for
CALLED_HERE = {
    "tp": "tensor_parallel_size",
    "dp": "data_parallel_size",
    "max_length": "max_model_len",
    "max_lora_rank": "lora_rank",
}
DEFAULTS = {"--host": "127.0.0.1", "--port": 8000, "--dtype": "auto"}


def serve(words: Sequence[str]) -> int:
    """Become the server. Returns (2) only when it cannot be started."""
    command = server_command(words)
    if FLAGS["use_vllm"].missing:
        print(f"error: vLLM is not installed here. Install it with: {FLAGS['use_vllm'].install}", file=sys.stderr)
        return 2
    _become(command)


def server_command(words: Sequence[str]) -> list[str]:
    """The command line of vLLM's server. What stands behind ``--`` is passed on as it is.

    vLLM's own defaults for sampling are used, not the model folder's, so that a completion ends only where the trainer
    says.
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
        # one adapter is computed with, and the next may be loaded before it leaves
        rank = str(next((known for known in LORA_RANKS if known >= arguments["lora_rank"]), arguments["lora_rank"]))
        command += ["--enable-lora", "--max-lora-rank", rank, "--max-loras", "1", "--max-cpu-loras", "2"]
    return command + words[cut + 1 :]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        unknown=" Options of `vllm serve` go behind `--`, such as `-- --enforce-eager`.",
        called_here=CALLED_HERE,
        prog="online-dpo serve",
        description="Start a vLLM server that a trainer with `use_vllm: true` and `vllm_mode: server` samples from.",
        epilog="Further options of `vllm serve` may follow behind `--`, such as `-- --enforce-eager`.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the policy, as in the run file")
    for option, (kind, text) in PASSED_ON.items():
        default = DEFAULTS.get(option)
        shown = "vLLM's" if default is None else "%(default)s"
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {shown})")
    parser.add_argument(
        LORA_RANK,
        type=int,
        help="take LoRA adapters of up to this rank, in place of whole weights: for a policy that is trained with one",
    )
    return parser


def _become(command: list[str]) -> NoReturn:
    """The variables open the addresses through which weights are replaced and adapters loaded."""
    opened = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    os.execvpe(command[0], command, {**os.environ, **opened})
