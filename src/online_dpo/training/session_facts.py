"""What a session of a run is recorded with: its settings, its command, and the machine and packages that it runs on."""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import subprocess  # for git alone  # nosec B404
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
import yaml

from online_dpo import __version__
from online_dpo.config.endpoints import holds_secret, secret_fields, shown_address
from online_dpo.config.secrets import FIELD
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.runs.plain_json import plain_or_named

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "vllm", "deepspeed", "ray")
PACKAGES += ("bitsandbytes", "numpy", "safetensors", "zstandard")
OF_PROCESS = ("local_rank", "log_level", "log_level_replica", "disable_tqdm", "resume_from_checkpoint")
"""Fields that say nothing of the run, or would keep it from being repeated."""
HIDDEN = "***"
GIT_SECONDS = 5.0
_TOKEN = re.compile(r"\b(sk-|hf_|gh[pousr]_|github_pat_|xox[a-z]-|wandb_v\d_)[\w-]{6,}")


def environment_facts(processes: int, command: Sequence[str]) -> dict[str, Any]:
    """Returns what is known of this machine, of its packages and of how the process was started.

    Args:
        processes: how many train.
        command: the words that started the run.
    """
    return {
        "started": time.time(),
        "versions": {"online_dpo": __version__, **_versions()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "devices": _facts_of_devices(),
        "processes": processes,
        "git": _git(),
        "folder": os.getcwd(),
        "command": shlex.join(without_secrets(command)),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _facts_of_devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return [{"name": platform.processor() or platform.machine(), "type": "cpu"}]
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": one.name, "type": "cuda", "memory": one.total_memory} for one in found]


def _git() -> dict[str, Any] | None:
    """The commit of the working folder, and whether it has been changed; ``None`` where it is no repository."""
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_git_output("status", "--porcelain", "--untracked-files=no"))}


def _git_output(*words: str) -> str | None:
    try:
        command = ["git", *words]  # words of ours
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)  # nosec B603
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command without what looks like a key or a token.

    >>> without_secrets(["train", "run.yaml", "--hub_token", "abc", "--api-key=abc", "http://me:pass@host/"])
    ['train', 'run.yaml', '--hub_token', '***', '--api-key=***', 'http://host/']
    """
    shown, hides = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if hides and not word.startswith("--"):
            word = HIDDEN
        elif word.startswith("--") or equals:
            is_secret = bool(secret_fields({name.lstrip("-").replace("-", "_"): value}))
            word = f"{name}={HIDDEN}" if is_secret and equals else word
            hides = is_secret and not equals
        shown.append(_TOKEN.sub(HIDDEN, shown_address(word) if "://" in word and holds_secret(word) else word))
    return shown


def settings_of(args: OnlineDPOConfig, parts: dict[str, str]) -> str:
    """Returns the settings of a run that was started in Python, as the text of a run file: what differs from the
    defaults, and the parts of the trainer as comments.
    """
    values, given = args.to_dict(), {}
    for field in fields(args):
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        value = values.get(field.name)
        if field.init and field.name not in (*OF_PROCESS, FIELD) and value != getattr(usual, "value", usual):
            given[field.name] = plain_or_named(value)
    lines = [f"# {name}: {' '.join(text.split())}" for name, text in parts.items()]
    lines.append("# Started in Python: give `model_name_or_path`, `dataset_name` and what scores to repeat it.")
    return "\n".join(lines) + "\n" + as_yaml(given)


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as the text of a run file, without fields that look like keys."""
    secret = secret_fields({name: value for name, value in settings.items() if value is not None})
    kept = {name: value for name, value in settings.items() if name not in (FIELD, *secret)}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)
