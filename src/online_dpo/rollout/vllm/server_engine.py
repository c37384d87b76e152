"""Sampling with vLLM servers, which run for themselves: on other devices, or on other machines.

A server may be killed and restarted at any time, and is then back at the weights it was started with. Weights therefore
carry a label that no other push has. Every server is asked for it before sampling and after; what was sampled while it
was not ours at both times is thrown away, the weights are sent again, and the server samples again.
"""

from __future__ import annotations

import base64
import copy
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import from_first_rank, is_first_rank, raise_first_ranks
from online_dpo.errors import RolloutServerError
from online_dpo.modeling.introspection import unwrapped
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.broadcast import BroadcastTransfer, choose_transfer, help_to_take
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
from online_dpo.rollout.vllm.worker import coarsest, shape_of
from online_dpo.rollout.weights.adapter import check_adapter, write_adapter
from online_dpo.rollout.weights.export import write_weights
from online_dpo.types import Group, Prompt

CHUNK_BYTES = 32 << 20
REQUESTS_AT_ONCE = 256  # to one server; vLLM decodes about as many together
MOST_ROUNDS = 5
NOT_YET = "it has lost the weights, and the process that can send them has not done so yet"
LOST = "it restarts again and again, or another run sends its own weights to it"


class VLLMServerEngine:
    """Samples from copies of the policy that vLLM servers hold.

    Weights reach a server by broadcast (`vllm_broadcast`), as files that we write to the temporary folder and it reads,
    or as the bytes of these files over HTTP.

    Where several processes train, each has an engine and samples for itself. The first one sends the weights. Another
    can send them again to a server that restarts if it sees the files of the first (on the same machine, or with a
    `TMPDIR` on a shared disk), and otherwise waits until that has been done.

    Servers that were started for adapters (``--lora-rank``) serve the base model, and are sent the adapter alone, each
    version under a name of its own. So nothing has to stand still meanwhile, and a completion of another version cannot
    come back.

    Args:
        urls: addresses of the servers, such as ``["http://localhost:8000"]``; prompts are spread over them.
        tokenizer: decodes completions.
        args: reads ``vllm_server_timeout``, ``vllm_weight_transfer``, ``vllm_group_port``, ``max_staleness`` and the
            device.

    Raises:
        ValueError: ``vllm_weight_transfer`` or ``vllm_group_port`` does not fit these servers.
        RolloutServerError: a server did not answer within ``vllm_server_timeout`` seconds, or takes no weights.
    """

    has_own_weights = True
    overlaps = True

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
    ) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)  # for another thread: a fast tokenizer cannot be used by two at once
        self._clients = [VLLMClient(url, args.vllm_server_timeout) for url in urls]
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE * len(self._clients), thread_name_prefix="rollout")
        self._gate = Gate()
        self._push_locks = {client.url: Lock() for client in self._clients}
        self._sender = uuid.uuid4().hex
        self._version: int | None = None
        self._label = ""
        self._folder: Path | None = None
        self._owned: TemporaryDirectory[str] | None = None
        ranks, dtypes = [], []
        for client in self._clients:
            client.call("/health")
            # a server that takes nothing says so here, and not at the first sync
            ranks += client.rpc("online_dpo_lora_rank")
            dtypes += client.rpc("online_dpo_dtype")
        self.own_dtype: torch.dtype | None = coarsest(dtypes)
        self._lora_rank = int(min(ranks, key=int))
        if self._lora_rank == 0 and set(ranks) != {"0"}:
            raise ValueError("Some servers take adapters and others do not. Give all of them `--lora-rank`, or none.")
        self._broadcast: BroadcastTransfer | None = None
        self.transfer = args.vllm_weight_transfer
        raise_first_ranks(self._set_up_transfer(args) if is_first_rank() else None)
        self.transfer = from_first_rank(self.transfer)

    def sync(self, model: nn.Module, version: int) -> None:
        """Sends the weights to every server, unless those of this version were the last sent. Until the next `sync`
        they can be sent again to servers that restart. Waits for a `generate` that is under way.

        Raises:
            ValueError: a server serves a model of another shape (vLLM crops larger weights without a word, and cannot
                be used again after smaller ones), or waits for adapters and the policy has none that fits.
            RolloutServerError: a server could not be used.
        """
        if version == self._version:
            return
        first = is_first_rank()
        if self._lora_rank:
            check_adapter(model, self._lora_rank)
        by_file = self.transfer != "broadcast"
        files = TemporaryDirectory(prefix="online-dpo-weights-") if by_file and first else None
        if by_file:
            write = write_adapter if self._lora_rank else write_weights
            write(model, Path(files.name) if files else None)
        raise_first_ranks(self._check_shapes(model) if first else None)
        with self._gate.changing():
            self._close_files()
            self._owned, self._version = files, version
            if self._broadcast is not None:
                self._broadcast.take(model)
            elif not by_file:
                help_to_take(model)
            folder = Path(files.name) if files else None
            self._folder, self._label = from_first_rank((folder, f"{self._sender}-{version}"))
            raise_first_ranks(self._send_all() if first else None)

    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """K completions for each prompt, in the prompts' order."""
        requests = build_requests(prompts, num_completions, vllm_sampling(params), key)
        # completions of one prompt go to one server, whose prefix cache then holds the prompt
        client_of = [self._clients[i // num_completions % len(self._clients)] for i in range(len(requests))]
        with self._gate.sampling():
            assert self._version is not None, "sync comes before generate"
            return build_groups(prompts, self._sample(requests, client_of), self.tokenizer, self._version)

    def release(self) -> None:
        """Nothing: servers have devices of their own."""

    def close(self) -> None:
        """Lets go of what was kept for the servers; they go on running."""
        self._pool.shutdown(cancel_futures=True)
        self._close_files()
        if self._broadcast is not None:
            self._broadcast.close()

    def _set_up_transfer(self, args: OnlineDPOConfig) -> Exception | None:
        try:
            self.transfer = choose_transfer(self.transfer, self._clients, args.device, self._lora_rank > 0)
            if self.transfer == "broadcast":
                overlaps = args.max_staleness > 0
                self._broadcast = BroadcastTransfer(self._clients, args.vllm_group_port, args.device, overlaps)
        except (RolloutServerError, ValueError) as error:
            return error
        return None

    def _close_files(self) -> None:
        if self._owned is not None:
            self._owned.cleanup()
            self._owned = None

    def _sample(self, requests: Sequence[Request], client_of: Sequence[VLLMClient]) -> list[Sampled]:
        """Asks until every answer comes from a server that had our weights before it and after it."""
        sampled: dict[int, Sampled] = {}
        waiting = list(range(len(requests)))
        for _ in range(MOST_ROUNDS):
            used = list({client_of[i].url: client_of[i] for i in waiting}.values())
            list(self._pool.map(self._bring_up_to_date, used))
            asked = [client_of[i] for i in waiting], [requests[i] for i in waiting]
            answers = list(self._pool.map(self._complete, *asked))
            current = {client.url for client in used if self._is_current(client)}
            sampled |= {
                i: answer
                for i, answer in zip(waiting, answers, strict=True)
                if answer is not None and client_of[i].url in current
            }
            waiting = [i for i in waiting if i not in sampled]
            if not waiting:
                return [sampled[i] for i in range(len(requests))]
        urls = ", ".join(sorted({client_of[i].url for i in waiting}))
        raise RolloutServerError(f"{urls} lost the weights {MOST_ROUNDS} times while sampling; last cause: {LOST}.")

    def _complete(self, client: VLLMClient, request: Request) -> Sampled | None:
        """``None`` where the server has no adapter of the present version."""
        body = {**request.options, "prompt": list(request.prompt_ids), "return_token_ids": True}
        if not self._lora_rank:
            return client.call("/v1/completions", body, read=from_response)
        try:
            return client.call("/v1/completions", {**body, "model": self._label}, read=from_response)
        except RolloutServerError:
            if self._is_current(client):
                raise
            return None  # it has restarted

    def _is_current(self, client: VLLMClient) -> bool:
        if self._lora_rank:
            return self._label in _models(client)
        return set(client.rpc("online_dpo_loaded")) == {self._label}

    def _check_shapes(self, model: nn.Module) -> Exception | None:
        ours = shape_of(unwrapped(model).config.get_text_config())
        try:
            for client in self._clients:
                theirs = client.rpc("online_dpo_shape")[0]
                differ = [f"{k} {theirs.get(k)} there and {ours[k]} here" for k in ours if ours[k] != theirs.get(k)]
                if differ:
                    message = f"{client.url} serves another model: {', '.join(differ)}. Serve the one that is trained."
                    return ValueError(message)
        except RolloutServerError as error:
            return error
        return None

    def _send_all(self) -> Exception | None:
        try:
            list(self._pool.map(self._bring_up_to_date, self._clients))
        except (RolloutServerError, ValueError) as error:
            return error
        return None

    def _bring_up_to_date(self, client: VLLMClient) -> None:
        """Sends the latest weights unless the server has them; again, if it restarted meanwhile."""
        if self._broadcast is None and not (self._folder is not None and self._folder.is_dir()):
            if self._lora_rank:
                client.call("/v1/models", read=self._expect_adapter)
            else:
                client.call("/collective_rpc", {"method": "online_dpo_loaded"}, read=self._expect_label)
            return
        for _ in range(MOST_ROUNDS):
            if self._is_current(client):
                return
            with self._push_locks[client.url]:
                if not self._is_current(client):  # another thread may have sent them
                    self._push(client)
        raise RolloutServerError(f"{client.url} does not keep the weights that are sent to it; last cause: {LOST}.")

    def _expect_label(self, answer: Any) -> None:
        if set(answer["results"]) != {self._label}:
            raise RuntimeError(NOT_YET)

    def _expect_adapter(self, answer: Any) -> None:
        if self._label not in _names(answer):
            raise RuntimeError(NOT_YET)

    def _push(self, client: VLLMClient) -> None:
        """A server that takes whole weights stands still meanwhile, and forgets the keys and values of the old ones."""
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
        """Adapters of other versions leave first: there is room for one."""
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
        client.call("/pause?mode=abort&clear_cache=false", {})  # what was asked by us and then given up ends here
        if by_file:
            client.rpc("online_dpo_load_folder", str(self._folder), self._label)
        else:
            sizes = {file.name: file.stat().st_size for file in files}
            client.rpc("online_dpo_load_received", self._sender, json.dumps(sizes), self._label)


def _models(client: VLLMClient) -> set[str]:
    return client.call("/v1/models", read=_names)


def _names(answer: Any) -> set[str]:
    return {model["id"] for model in answer["data"]}


def _chunks(files: Sequence[Path]) -> Iterator[tuple[str, int, str]]:
    """Pieces of the files, as text: name, place in the file, base64."""
    for path in files:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield path.name, file.tell() - len(data), base64.b64encode(data).decode()


def _expect_success(answer: Any) -> None:
    if not answer["success"]:
        raise RuntimeError("the prefix cache could not be emptied: requests are still running")
