"""What vLLM's workers learn to do for us: take new weights, and say which they have.

vLLM imports this file in its worker processes (`--worker-extension-cls`) and mixes the class into its own worker; keep
the imports light.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from online_dpo.rollout.weights.process_group import Rendezvous, TransferStopped, WeightGroup, follow, receive_weights

EXTENSION = "online_dpo.rollout.vllm.worker.WeightUpdates"
SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
)


class WeightUpdates:
    """Methods for `collective_rpc`. Names begin with ``online_dpo``, since vLLM refuses those that its worker has.

    A *label* names weights that were pushed. It is forgotten before loading and remembered after, so that half-loaded
    weights have none, and a worker that started anew has none either.
    """

    online_dpo_label: str | None = None
    online_dpo_uploads: dict[str, TemporaryDirectory[str]] = {}  # by sender
    online_dpo_group: WeightGroup | None = None  # with the trainer that broadcast last

    def online_dpo_loaded(self) -> str:
        """The label of the weights in use; empty for those that the worker started with."""
        return self.online_dpo_label or ""

    def online_dpo_shape(self) -> dict[str, Any]:
        """What the model that is served looks like."""
        return shape_of(self.model_config.hf_text_config)  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_lora_rank(self) -> str:
        """The largest rank of an adapter that can be put on top of the model, ``0`` where none can."""
        config = self.vllm_config.lora_config  # pyright: ignore[reportAttributeAccessIssue]
        return str(config.max_lora_rank if config else 0)

    def online_dpo_dtype(self) -> str:
        """The type of its weights and of what it computes, such as ``bfloat16``."""
        return str(self.model_config.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_device(self) -> str:
        """What it computes on: see `device_name`."""
        return device_name(self.device)  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_sees(self, path: str) -> str:
        """Whether this worker's machine has the trainer's file, ``yes`` or ``no`` (what HTTP returns is text)."""
        return "yes" if Path(path).is_file() else "no"

    def online_dpo_load(self, weights: Iterable[tuple[str, torch.Tensor]], label: str) -> None:
        """Replaces all weights, given under their checkpoint names, while no request is running."""
        self.online_dpo_label = None
        pushed: set[str] = set()
        model = self.get_model()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self.reload_weights(weights_iterator=_noting_names(weights, pushed))  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException:
            end_loading(model, self.model_config)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        renew_output_head(model, pushed)
        self.online_dpo_label = label

    def online_dpo_load_folder(self, folder: str, label: str) -> None:
        """Loads the safetensors files of a folder that this machine sees."""
        self.online_dpo_load(_read_folder(Path(folder)), label)

    def online_dpo_load_broadcast(
        self, host: str, port: str, transfer: str, size: str, kind: str, timeout: str, label: str
    ) -> str:
        """Loads what the trainer broadcasts (see `weight_group`). Answers why not, where the transfer was given up and
        may be tried again, else nothing. What raises an error would raise it again.
        """
        parallel = self.vllm_config.parallel_config  # pyright: ignore[reportAttributeAccessIssue]
        rank = 1 + parallel.data_parallel_index * parallel.world_size + self.rank  # pyright: ignore[reportAttributeAccessIssue]
        device = self.device if kind == "nccl" else torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
        try:
            meeting = Rendezvous(host, int(port), transfer, float(timeout))
            with meeting.telling("a worker of the server"):
                self.online_dpo_group = follow(meeting, rank, int(size), device, self.online_dpo_group)
                self.online_dpo_load(receive_weights(self.online_dpo_group, meeting), label)
        except BaseException as error:
            if self.online_dpo_group is not None:
                self.online_dpo_group.close()
                self.online_dpo_group = None
            if isinstance(error, TransferStopped):
                return str(error)
            raise
        return ""

    def online_dpo_receive(self, sender: str, file: str, offset: str, chunk: str) -> None:
        """Writes a piece (base64) of a file that is being sent. Sent twice, it changes nothing; one whose predecessor
        went to a worker that is gone is dropped.
        """
        if sender not in self.online_dpo_uploads:
            self.online_dpo_uploads[sender] = TemporaryDirectory(prefix="online-dpo-weights-")
        path = Path(self.online_dpo_uploads[sender].name) / Path(file).name
        path.touch()
        if int(offset) <= path.stat().st_size:
            with path.open("r+b") as target:
                target.seek(int(offset))
                target.write(base64.b64decode(chunk))

    def online_dpo_load_received(self, sender: str, sizes: str, label: str) -> None:
        """Loads the files that were sent, and deletes them. Does nothing when they are not complete (``sizes`` is the
        JSON of their names and bytes): a worker that restarted has received only the rest.
        """
        if sender not in self.online_dpo_uploads:
            return
        folder = Path(self.online_dpo_uploads[sender].name)
        if json.loads(sizes) == {path.name: path.stat().st_size for path in folder.iterdir()}:
            self.online_dpo_load_folder(str(folder), label)
        self.online_dpo_forget_received(sender)

    def online_dpo_forget_received(self, sender: str) -> None:
        """Deletes what an interrupted sending has left behind."""
        if sender in self.online_dpo_uploads:
            self.online_dpo_uploads.pop(sender).cleanup()


def shape_of(config: Any) -> dict[str, Any]:
    """The fields of a text model's config that tell it from a model whose weights would not fit."""
    values = config.to_dict()
    return {name: values[name] for name in SHAPE_FIELDS if name in values}


def coarsest(dtypes: Iterable[str]) -> torch.dtype:
    """That of the workers' types which rounds most.

    >>> coarsest(["float32", "bfloat16"])
    torch.bfloat16
    """
    return max((getattr(torch, name) for name in dtypes), key=lambda dtype: torch.finfo(dtype).eps)


def device_name(device: torch.device) -> str:
    """``cuda`` and the GPU's UUID, which is the same in every process; of others the kind, such as ``cpu``."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def end_loading(model: Any, config: Any) -> None:
    """After loading that broke off: what has arrived is in place, what has not is as it was or undefined. Without this,
    the next loading would take up the half of this one.
    """
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
        finalize_layerwise_reload,
    )

    finalize_layerwise_reload(model, config)


def renew_output_head(model: Any, pushed: set[str]) -> None:
    """Makes an output head that shares the input embedding's weight use the new one.

    Weights that were pushed without a head of their own are tied. vLLM ties a head when it starts, unless the
    checkpoint it started with held a head that differed. And on a CPU a head computes with a packed copy of its weight,
    which loading the embedding alone leaves as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    layers = {n: m for n, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
    heads = {name: layer for name, layer in layers.items() if isinstance(layer, ParallelLMHead)}
    embeddings = [layer for name, layer in layers.items() if name not in heads]
    for name, head in heads.items():
        leaf = name.rpartition(".")[2]
        if len(embeddings) == 1 and not any(f".{key}".endswith(f".{leaf}.weight") for key in pushed):
            head.weight = embeddings[0].weight
        head.quant_method.process_weights_after_loading(head)


def _noting_names(weights: Iterable[tuple[str, torch.Tensor]], names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        names.add(name)
        yield name, tensor


def _read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"No safetensors files in {folder}.")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.offset_keys():
                yield name, tensors.get_tensor(name)
