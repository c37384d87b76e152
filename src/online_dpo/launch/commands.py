"""The command lines of the processes of a run. Pure: Ray is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from online_dpo.launch.settings import RaySettings

PACKAGE = ("-m", "online_dpo")
PLANNED = "http://127.0.0.1:8000"
"""An address with which a run is checked before its servers have theirs."""


def with_servers(urls: Sequence[str]) -> list[str]:
    """The words that make a run sample from these servers."""
    if not urls:
        return []
    return ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", ",".join(urls)]


def train_words(run_file: Path | None, words: Sequence[str], urls: Sequence[str], checkpoint: Path | None) -> list[str]:
    """The words after Python of a process that trains.

    Args:
        words: those of the command after the run file.
        checkpoint: one of this run, to go on from.
    """
    file = [] if run_file is None else [str(run_file)]
    again = [] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
    return [*PACKAGE, "train", *file, *words, *with_servers(urls), *again]


def serve_words(
    model: str, settings: RaySettings, host: str, port: int, *, revision: str | None, trust_remote_code: bool
) -> list[str]:
    """The words after Python of a server."""
    given = settings.server_words
    cut = given.index("--") if "--" in given else len(given)
    own, for_vllm = list(given[:cut]), list(given[cut + 1 :])
    names = {word.partition("=")[0].replace("_", "-") for word in given}
    if settings.server_gpus > 1 and not names & {"--tensor-parallel-size", "--data-parallel-size"}:
        own += ["--tensor-parallel-size", str(settings.server_gpus)]
    if settings.server_gpus > 1 and "--distributed-executor-backend" not in names:
        for_vllm += ["--distributed-executor-backend", "mp"]  # all of its GPUs are on one machine
    for_vllm += ["--revision", revision] if revision is not None else []
    for_vllm += ["--trust-remote-code"] if trust_remote_code else []
    words = [*PACKAGE, "serve", model, "--host", host, "--port", str(port), *own]
    return [*words, "--", *for_vllm] if for_vllm else words
