"""Sampling with vLLM servers: separate processes, on other devices or other machines.

A server may be killed and restarted at any time, and then has the weights again that it was started with. So weights
are sent with a unique label, and every server is asked for its label before and after sampling. Completions are
discarded unless the label was the latest both times; then the weights are sent again, and the server samples again.
"""

from __future__ import annotations

import base64
import copy
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import RankErrors, from_first_rank, is_first_rank, raise_first_ranks
from online_dpo.distributed.weights import is_sharded
from online_dpo.errors import RolloutServerError, error_text
from online_dpo.modeling.introspection import unwrapped
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.broadcast import BroadcastTransfer, choose_transfer
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.gate import Gate
from online_dpo.rollout.vllm.requests import (
    Request,
    Sampled,
    build_groups,
    build_requests,
    from_response,
    vllm_sampling,
)
from online_dpo.rollout.vllm.worker import coarsest, differing_shape
from online_dpo.rollout.weights.adapter import check_adapter, write_adapter
from online_dpo.rollout.weights.export import write_weights
from online_dpo.runs import events
from online_dpo.types import Group, Prompt

T = TypeVar("T")

CHUNK_BYTES = 32 << 20
MAX_CONCURRENT_REQUESTS = 256  # to one server; vLLM decodes about as many in one batch
MAX_ATTEMPTS = 5
WEIGHTS_PENDING = "it has lost the weights, and the process that can send them has not done so yet"
WEIGHTS_LOST = "it restarts again and again, or another run sends its own weights to it"


class VLLMServerEngine:
    """Samples from copies of the policy that vLLM servers hold.

    Weights are sent to a server by broadcast (`BroadcastTransfer`), as files in the temporary folder that the server
    reads, or as the bytes of these files over HTTP.

    Weights of a sharded policy are gathered one by one and go to files first, also for a broadcast, because a server
    that restarts needs them when the other processes do not help.

    If several processes train, each has its own engine and samples for its own prompts. The first process sends the
    weights. If a server restarts, another process can send them again if it can read the files of the first (on the
    same machine, or with a `TMPDIR` on a shared disk); otherwise it waits until the first one has done so.

    Servers that were started for adapters (``--lora-rank``) serve the base model. They are sent the adapter alone, each
    version under a unique name. So a server need not pause for new weights, and no completion can be of another version
    than the one it was requested from.

    Args:
        urls: addresses of the servers, such as ``["http://localhost:8000"]``; prompts are spread over them.
        tokenizer: decodes completions.
        args: the fields ``vllm_server_timeout``, ``vllm_weight_transfer``, ``vllm_group_port``, ``max_staleness`` and
            the device are used.

    Raises:
        ValueError: ``vllm_weight_transfer`` or ``vllm_group_port`` is not possible with these servers.
        RolloutServerError: a server did not answer within ``vllm_server_timeout`` seconds, or does not take weights.
    """

    has_own_weights = True
    overlaps = True

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
    ) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)  # `generate` runs in another thread; fast tokenizers allow one only
        self._clients = [VLLMClient(url, args.vllm_server_timeout) for url in urls]
        self._pool = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS * len(self._clients), thread_name_prefix="rollout")
        self._gate = Gate()
        self._push_locks = {client.url: Lock() for client in self._clients}
        self._sender = uuid.uuid4().hex
        self._version: int | None = None
        self._label = ""
        self._folder: Path | None = None
        self._temporary_folder: TemporaryDirectory[str] | None = None
        self._errors = RankErrors(args.device)
        ranks, dtypes = [], []
        for client in self._clients:
            client.call("/health")
            # A server that does not take weights fails here, and not at the first sync.
            ranks += client.rpc("online_dpo_lora_rank")
            dtypes += client.rpc("online_dpo_dtype")
        self.own_dtype: torch.dtype | None = coarsest(dtypes)
        self._lora_rank = int(min(ranks, key=int))
        if self._lora_rank == 0 and set(ranks) != {"0"}:
            raise ValueError("Some servers take adapters and others do not. Start all with `--lora-rank`, or none.")
        self._broadcast: BroadcastTransfer | None = None
        self.transfer = args.vllm_weight_transfer
        raise_first_ranks(self._set_up_transfer(args) if is_first_rank() else None)
        self.transfer = from_first_rank(self.transfer)

    def sync(self, model: nn.Module, version: int) -> None:
        """Sends the weights to every server, unless those of this version were the last that were sent.

        Until the next `sync` they are kept for servers that restart. Waits for a `generate` that is running.

        Raises:
            ValueError: a server serves a model of another shape (vLLM would crop larger weights silently, and fail
                for good after smaller ones), or takes adapters and the policy has no suitable one.
            RolloutServerError: a server could not be used.
        """
        if version == self._version:
            return
        first = is_first_rank()
        if self._lora_rank:
            check_adapter(model, self._lora_rank)
        files = self._written(model) if self.transfer != "broadcast" or is_sharded(model) else None
        raise_first_ranks(self._check_shapes(model) if first else None)
        with self._gate.changing():
            self._close_files()
            self._temporary_folder, self._version = files, version
            folder = Path(files.name) if files else None
            self._errors.run(lambda: self._set_broadcast(model, folder))
            self._folder, self._label = from_first_rank((folder, f"{self._sender}-{version}"))
            raise_first_ranks(self._send_all() if first else None)

    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """Samples K completions for each prompt; returns the groups in the prompts' order."""
        requests = build_requests(prompts, num_completions, vllm_sampling(params), key)
        # All completions of a prompt go to one server, whose prefix cache then holds the prompt.
        client_of = [self._clients[i // num_completions % len(self._clients)] for i in range(len(requests))]
        with self._gate.sampling():
            assert self._version is not None, "sync comes before generate"
            return build_groups(prompts, self._sample(requests, client_of), self.tokenizer, self._version)

    def release(self) -> None:
        """Does nothing: servers have their own devices."""

    def close(self) -> None:
        """Frees threads, files and process groups. The servers keep running."""
        self._pool.shutdown(cancel_futures=True)
        self._close_files()
        if self._broadcast is not None:
            self._broadcast.close()

    def _set_up_transfer(self, args: OnlineDPOConfig) -> Exception | None:
        """Chooses how weights are sent and prepares it; returns an error instead of raising it, for all ranks."""
        try:
            self.transfer = choose_transfer(self.transfer, self._clients, args.device, self._lora_rank > 0)
            if self.transfer == "broadcast":
                overlaps = args.max_staleness > 0
                self._broadcast = BroadcastTransfer(self._clients, args.vllm_group_port, args.device, overlaps)
        except (RolloutServerError, ValueError) as error:
            return error
        return None

    def _written(self, model: nn.Module) -> TemporaryDirectory[str] | None:
        """Writes the weights or the adapter to files, on the first rank; a collective operation."""
        files = self._errors.run(lambda: _on_disk(_new_folder) if is_first_rank() else None)
        write = write_adapter if self._lora_rank else write_weights
        self._errors.run(lambda: _on_disk(lambda: write(model, Path(files.name) if files else None)))
        return files

    def _set_broadcast(self, model: nn.Module, folder: Path | None) -> None:
        """Sets what is broadcast, on the first rank."""
        if self._broadcast is None:
            return
        if folder is None:
            self._broadcast.set_weights(model)
        else:
            self._broadcast.set_folder(folder)

    def _close_files(self) -> None:
        if self._temporary_folder is not None:
            self._temporary_folder.cleanup()
            self._temporary_folder = None

    def _sample(self, requests: Sequence[Request], client_of: Sequence[VLLMClient]) -> list[Sampled]:
        """Requests completions until each comes from a server that had the latest weights before and after it."""
        sampled: dict[int, Sampled] = {}
        waiting = list(range(len(requests)))
        for _ in range(MAX_ATTEMPTS):
            used = list({client_of[i].url: client_of[i] for i in waiting}.values())
            list(self._pool.map(self._ensure_weights, used))
            clients = [client_of[i] for i in waiting]
            answers = list(self._pool.map(self._complete, clients, [requests[i] for i in waiting]))
            up_to_date = {client.url for client in used if self._is_up_to_date(client)}
            sampled |= {
                i: answer
                for i, answer in zip(waiting, answers, strict=True)
                if answer is not None and client_of[i].url in up_to_date
            }
            waiting = [i for i in waiting if i not in sampled]
            for url in sorted({client.url for client in used} - up_to_date):
                text = (
                    f"{url} lost the weights while it sampled: it has restarted, or others use it. It gets them again."
                )
                events.emit("server", text, url=url)
            if not waiting:
                return [sampled[i] for i in range(len(requests))]
        urls = ", ".join(sorted({client_of[i].url for i in waiting}))
        raise RolloutServerError(
            f"{urls} lost the weights {MAX_ATTEMPTS} times while sampling; last cause: {WEIGHTS_LOST}."
        )

    def _complete(self, client: VLLMClient, request: Request) -> Sampled | None:
        """Requests one completion; ``None`` if the server does not have the latest adapter any more."""
        body = {**request.options, "prompt": list(request.prompt_ids), "return_token_ids": True}
        if not self._lora_rank:
            return client.call("/v1/completions", body, read=from_response)
        try:
            return client.call("/v1/completions", {**body, "model": self._label}, read=from_response)
        except RolloutServerError:
            if self._is_up_to_date(client):
                raise
            return None  # the server has restarted

    def _is_up_to_date(self, client: VLLMClient) -> bool:
        """Whether the server has the weights of the last `sync`."""
        if self._lora_rank:
            return self._label in _models(client)
        return set(client.rpc("online_dpo_loaded")) == {self._label}

    def _check_shapes(self, model: nn.Module) -> Exception | None:
        """The error, if any, of a server whose model has another shape than the policy."""
        try:
            for client in self._clients:
                served = client.rpc("online_dpo_shape")[0]
                if differ := differing_shape(served, unwrapped(model).config.get_text_config()):
                    return ValueError(f"{client.url} serves another model: {differ}. Serve the one that is trained.")
        except RolloutServerError as error:
            return error
        return None

    def _send_all(self) -> Exception | None:
        """Sends the weights to all servers; returns an error instead of raising it, for all ranks."""
        try:
            list(self._pool.map(self._ensure_weights, self._clients))
        except (RolloutServerError, ValueError) as error:
            return error
        return None

    def _ensure_weights(self, client: VLLMClient) -> None:
        """Sends the latest weights to a server unless it has them; again, if it restarts meanwhile.

        A process that cannot send them itself waits until another has done so.
        """
        if self._broadcast is None and not (self._folder is not None and self._folder.is_dir()):
            if self._lora_rank:
                client.call("/v1/models", read=self._expect_adapter)
            else:
                client.call("/collective_rpc", {"method": "online_dpo_loaded"}, read=self._expect_label)
            return
        for _ in range(MAX_ATTEMPTS):
            if self._is_up_to_date(client):
                return
            with self._push_locks[client.url]:
                if not self._is_up_to_date(client):  # another thread may have sent them while this one waited
                    self._push(client)
        raise RolloutServerError(
            f"{client.url} does not keep the weights that are sent to it; last cause: {WEIGHTS_LOST}."
        )

    def _expect_label(self, answer: Any) -> None:
        if set(answer["results"]) != {self._label}:
            raise RuntimeError(WEIGHTS_PENDING)

    def _expect_adapter(self, answer: Any) -> None:
        if self._label not in _names(answer):
            raise RuntimeError(WEIGHTS_PENDING)

    def _push(self, client: VLLMClient) -> None:
        """Sends the weights to one server.

        For whole weights the server is paused, and its prefix cache is emptied: it holds keys and values of the old
        weights.
        """
        if self._lora_rank:
            self._push_adapter(client)
            return
        if self._broadcast is not None:
            self._broadcast.push(client, self._label)
        else:
            self._push_files(client)
        client.call("/reset_prefix_cache", {}, read=_expect_success)
        client.call("/resume", {})

    def _push_adapter(self, client: VLLMClient) -> None:
        """Loads the adapter into one server, after its earlier versions are unloaded: there is room for one."""
        assert self._folder is not None
        config = self._folder / "adapter_config.json"
        if set(client.rpc("online_dpo_sees", str(config))) != {"yes"}:
            raise RolloutServerError(
                f"{client.url} does not see the folder {self._folder}, from which adapters are read. Set `TMPDIR` to a "
                "disk that both see, or start the server without `--lora-rank`."
            )
        for name in _models(client):
            if name.startswith(self._sender):
                client.call("/v1/unload_lora_adapter", {"lora_name": name})
        client.call("/v1/load_lora_adapter", {"lora_name": self._label, "lora_path": str(self._folder)})

    def _push_files(self, client: VLLMClient) -> None:
        """Pauses the server and lets it load the files of weights: from their folder if it can, else over HTTP."""
        assert self._folder is not None
        files = sorted(self._folder.iterdir())
        by_file = self.transfer != "http" and set(client.rpc("online_dpo_sees", str(files[0]))) == {"yes"}
        if self.transfer == "file" and not by_file:
            raise RolloutServerError(
                f"{client.url} does not see the folder {self._folder}. Set `TMPDIR` to a disk that both see, or "
                "`vllm_weight_transfer` to `http`."
            )
        if not by_file:
            client.rpc("online_dpo_forget_received", self._sender)
            for name, offset, chunk in _chunks(files):
                client.rpc("online_dpo_receive", self._sender, name, str(offset), chunk)
        client.call("/pause?mode=abort&clear_cache=false", {})  # also aborts requests of ours that were given up
        if by_file:
            client.rpc("online_dpo_load_folder", str(self._folder), self._label)
        else:
            sizes = {file.name: file.stat().st_size for file in files}
            client.rpc("online_dpo_load_received", self._sender, json.dumps(sizes), self._label)


def _new_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="online-dpo-weights-")


def _on_disk(action: Callable[[], T]) -> T:
    """Calls what writes to the temporary folder.

    Raises:
        RolloutServerError: the disk does not take it.
    """
    try:
        return action()
    except (OSError, SafetensorError) as error:
        raise RolloutServerError(
            f"The weights for vLLM servers cannot be written to the temporary folder: {error_text(error)}. Set "
            "`TMPDIR` to a disk with room for them twice."
        ) from error


def _models(client: VLLMClient) -> set[str]:
    """The names of all models and adapters that the server has."""
    return client.call("/v1/models", read=_names)


def _names(answer: Any) -> set[str]:
    """The names in an answer of ``/v1/models``."""
    return {model["id"] for model in answer["data"]}


def _chunks(files: Sequence[Path]) -> Iterator[tuple[str, int, str]]:
    """The files in pieces: for each its file's name, its offset in the file, and its bytes in base64."""
    for path in files:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield path.name, file.tell() - len(data), base64.b64encode(data).decode()


def _expect_success(answer: Any) -> None:
    if not answer["success"]:
        raise RuntimeError("the prefix cache could not be emptied: requests are still running")
