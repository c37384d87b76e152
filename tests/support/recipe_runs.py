"""Runs of recipes: each by its own command, with smaller settings, in forks of a process that has imported all.

The models and datasets that recipes name come from `support.hub`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from faults.runs import Ended, Running, Zygote
from online_dpo.cli.recipes import Recipe
from support import tiny
from support.hub import make_hub
from support.processes import free_port

SMALL = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_new_tokens": 12,
    "max_length": 400,
    "save_strategy": "no",
    "use_cpu": "true",
}
LIMIT = 120.0


class Recipes:
    """A warmed process beside the models and datasets of recipes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variables = make_hub(root / "hub")
        policy = root / "policy"
        tiny.causal_lm(sharpness=1.0).save_pretrained(policy)
        tiny.tokenizer().save_pretrained(policy)
        self._zygote = Zygote(policy, **self.variables)
        self._numbers = count()

    def run(self, folder: Path, words: Sequence[str], ranks: Sequence[dict[str, str]] = ({},)) -> list[Ended]:
        """Runs `online-dpo` with these words, in a process for each of ``ranks``, which are its variables."""
        pids, places = [], []
        for variables in ranks:
            place = self.root / "logs" / str(next(self._numbers))
            place.mkdir(parents=True)
            files = {name: str(place / name) for name in ("stdout", "stderr", "stack")}
            request = {"folder": str(folder), "words": list(words), "environment": variables, "limit": LIMIT}
            pids.append(self._zygote.ask(request | files | {"inject": None, "writes": None}))
            places.append(place)
        return Running(self._zygote, pids, folder, places, LIMIT).wait()

    def close(self) -> None:
        self._zygote.close()


def options(fields: dict[str, Any]) -> list[str]:
    """Fields as words of a command line."""
    words = []
    for name, value in fields.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def two_ranks(own: dict[str, str] | None = None) -> list[dict[str, str]]:
    """The variables of two processes on CPUs, as launchers set them."""
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**(own or {}), **both, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def launch(recipe: Recipe, folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The words behind `online-dpo` of a recipe's last command, and the variables of its processes: two for several."""
    words = [word for word in shlex.split(recipe.commands[-1]) if not word.startswith("CUDA_VISIBLE_DEVICES=")]
    if words[0] == "sbatch":
        return by_slurm(folder, words[1])
    if words[0] in ("accelerate", "torchrun"):
        assert "-m" in words, words
        at = words.index("-m")
        assert words[at + 1] == "online_dpo"
        own = by_accelerate(folder, words[2:at]) if words[0] == "accelerate" else {}
        return words[at + 2 :], two_ranks(own)
    assert words[0] == "online-dpo", words
    if words[1] == "ray":  # a cluster is started in tests/ray_cluster; here, what it starts
        return ["train", words[2]], two_ranks()
    return words[1:], [{}]


def by_accelerate(folder: Path, words: Sequence[str]) -> dict[str, str]:
    """The variables that `accelerate launch` sets with these words, for two processes on CPUs."""
    at = os.getcwd()
    os.chdir(folder)
    try:
        arguments = launch_command_parser().parse_args([*words, "--num_processes", "2", "train.py"])
        arguments, defaults, _ = _validate_launch_command(arguments)
    finally:
        os.chdir(at)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(arguments)[1] | {"DS_ACCELERATOR": "cpu"}
    else:
        variables = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


def by_slurm(folder: Path, script: str) -> tuple[list[str], list[dict[str, str]]]:
    """What each task of a script runs, and the variables it has. Slurm's commands are stood in for: `srun` starts two
    tasks, and `online-dpo` writes down its words and variables.
    """
    tools = folder / "tools"
    tools.mkdir()
    each = 'for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NTASKS=2 "${@:2}" || exit; done'
    stand_ins = {
        "scontrol": 'test "$1" != requeue && echo 127.0.0.1',
        "srun": each,
        "online-dpo": 'echo "$@" > task-$RANK.words; env -0 > task-$RANK.env',
    }
    for name, text in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], cwd=folder, env=os.environ | slurm, capture_output=True, text=True)
    assert done.stderr == "", done.stderr
    words = [(folder / f"task-{n}.words").read_text().split() for n in range(2)]
    assert words[0] == words[1]
    ranks = []
    for n in range(2):
        pairs = (pair.split("=", 1) for pair in (folder / f"task-{n}.env").read_text().split("\0") if pair)
        seen = {name: value for name, value in pairs if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
        ranks.append(seen | {"MASTER_PORT": "", "GLOO_SOCKET_IFNAME": "lo"})
    port = str(free_port())
    return words[0], [variables | {"MASTER_PORT": port} for variables in ranks]
