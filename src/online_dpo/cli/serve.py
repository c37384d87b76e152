"""``online-dpo serve``: a vLLM server that takes the trainer's weights."""

from __future__ import annotations

import ipaddress
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.config.endpoints import read_key
from online_dpo.config.requirements import FLAGS
from online_dpo.config.vllm import supported_lora_rank

KEY_VARIABLE = "VLLM_API_KEY"
KEY_MIDDLEWARE = "online_dpo.rollout.vllm.key.RequireKey"
WITHOUT_KEY = "--without-key"
EXTENSION = "online_dpo.rollout.vllm.worker.WeightUpdates"
PASSED_ON = {
    "--host": (str, f"address to listen on; other than this machine's own one it needs a key in {KEY_VARIABLE}"),
    "--port": (int, "port to listen on"),
    "--tensor-parallel-size": (int, "GPUs over which one copy of the model is split"),
    "--data-parallel-size": (int, "copies of the model"),
    "--dtype": (str, "type of weights and activations, such as bfloat16; `auto` takes the model's"),
    "--gpu-memory-utilization": (float, "share of each GPU's memory that vLLM uses"),
    "--max-model-len": (int, "longest prompt plus completion, in tokens"),
    "--max-num-seqs": (int, "most completions decoded at the same time"),
}
LORA_RANK = "--lora-rank"
CALLED_HERE = {
    "tp": "tensor_parallel_size",
    "dp": "data_parallel_size",
    "max_length": "max_model_len",
    "max_lora_rank": "lora_rank",
}
DEFAULTS = {"--host": "127.0.0.1", "--port": 8000, "--dtype": "auto"}


def serve(words: Sequence[str]) -> int:
    """Replace this process by the server. Returns (the exit code 2) only if the server cannot be started."""
    try:
        command = server_command(words)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
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

    Raises:
        ValueError: others could reach the server without a key, or the key cannot be used.
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
        rank = str(supported_lora_rank(arguments["lora_rank"]))
        command += ["--enable-lora", "--max-lora-rank", rank, "--max-loras", "1", "--max-cpu-loras", "2"]
    return command + _asking_for_key(arguments, words[cut + 1 :]) + words[cut + 1 :]


def _asking_for_key(arguments: dict[str, Any], passed_on: Sequence[str]) -> list[str]:
    """The options with which the server asks for its key, if it has one."""
    if any(word.partition("=")[0] in ("--api-key", "--api_key") for word in passed_on):
        raise ValueError(
            f"`--api-key` shows the key to everybody on this machine. Set the environment variable {KEY_VARIABLE}, "
            "here and for the trainer."
        )
    if read_key(KEY_VARIABLE) is not None:
        return ["--middleware", KEY_MIDDLEWARE]
    hosts = _values(passed_on, "--host") or [arguments["host"]]
    for host in itertools.filterfalse(_is_loopback, hosts):
        danger = f"who reaches {host}:{arguments['port']} can run code in this server and replace its weights"
        if not arguments["without_key"]:
            raise ValueError(
                f"Everybody {danger}. Set a key in the environment variable {KEY_VARIABLE}, here and for the trainer; "
                f"on a network that you trust, `{WITHOUT_KEY}` goes without."
            )
        print(f"warning: everybody {danger} (`{WITHOUT_KEY}`)", file=sys.stderr)
    return []


def _values(words: Sequence[str], option: str) -> list[str]:
    """The values of an option in words for vLLM."""
    spaced = [value for word, value in itertools.pairwise(words) if word == option]
    return spaced + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
        WITHOUT_KEY, action="store_true", help="let everybody who can reach the address use the server without a key"
    )
    parser.add_argument(
        LORA_RANK,
        type=int,
        help="receive LoRA adapters of up to this rank instead of all weights: for a policy trained with an adapter",
    )
    return parser


def _replace_process(command: list[str]) -> NoReturn:
    """Run a command in place of this process, with the variables that enable weight updates and adapter loading."""
    enabled = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    os.execvpe(command[0], command, {**os.environ, **enabled})  # the user's own words  # nosec B606
