"""The extension of vLLM's workers that loads new weights and reports which weights they have.

vLLM imports this module in its worker processes (`--worker-extension-cls`) and mixes the class into its own worker
class, so its imports must stay light.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from online_dpo.rollout.weights.process_group import (
    Rendezvous,
    TransferStopped,
    WeightGroup,
    form_group_as_worker,
    receive_weights,
)

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
    """Methods for `collective_rpc`. Their names begin with ``online_dpo``, since vLLM refuses names its worker has.

    A *label* identifies weights that were sent. It is deleted before loading and set after it, so weights that are
    loaded in part have none, nor has a worker that was restarted.
    """

    online_dpo_label: str | None = None
    online_dpo_uploads: dict[str, TemporaryDirectory[str]] = {}  # by sender
    online_dpo_group: WeightGroup | None = None  # with the trainer that broadcast last

    def online_dpo_loaded(self) -> str:
        """The label of the present weights; empty for those that the worker was started with."""
        return self.online_dpo_label or ""

    def online_dpo_shape(self) -> dict[str, Any]:
        """The shape of the model that is served: see `shape_of`."""
        return shape_of(self.model_config.hf_text_config)  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_lora_rank(self) -> str:
        """The largest rank of an adapter that the worker can load; ``0`` if it takes none."""
        config = self.vllm_config.lora_config  # pyright: ignore[reportAttributeAccessIssue]
        return str(config.max_lora_rank if config else 0)

    def online_dpo_dtype(self) -> str:
        """The dtype in which the worker holds weights and computes, such as ``bfloat16``."""
        return str(self.model_config.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_device(self) -> str:
        """The worker's device: see `device_name`."""
        return device_name(self.device)  # pyright: ignore[reportAttributeAccessIssue]

    def online_dpo_sees(self, path: str) -> str:
        """Whether this worker can read a file of the trainer, as ``yes`` or ``no``: answers are sent as text."""
        return "yes" if Path(path).is_file() else "no"

    def online_dpo_load(self, weights: Iterable[tuple[str, torch.Tensor]], label: str) -> None:
        """Replaces all weights, given by their checkpoint names. No request may be running."""
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
        """Loads the safetensors files of a folder that this worker can read."""
        self.online_dpo_load(read_folder(Path(folder)), label)

    def online_dpo_load_broadcast(
        self, host: str, port: str, secret: str, transfer: str, size: str, kind: str, timeout: str, label: str
    ) -> str:
        """Loads weights that the trainer broadcasts (see `rollout.weights.process_group`), which knows the secret.

        Returns:
            Why the transfer was stopped, if it may be tried again; empty if all went well.

        Raises:
            Exception: an error that would come again at the next attempt.
        """
        parallel = self.vllm_config.parallel_config  # pyright: ignore[reportAttributeAccessIssue]
        rank = 1 + parallel.data_parallel_index * parallel.world_size + self.rank  # pyright: ignore[reportAttributeAccessIssue]
        device = self.device if kind == "nccl" else torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
        try:
            rendezvous = Rendezvous.join(host, int(port), secret, transfer, float(timeout))
            with rendezvous.reporting_errors_as("a worker of the server"):
                self.online_dpo_group = form_group_as_worker(rendezvous, rank, int(size), device, self.online_dpo_group)
                self.online_dpo_load(receive_weights(self.online_dpo_group, rendezvous), label)
        except BaseException as error:
            if self.online_dpo_group is not None:
                self.online_dpo_group.close()
                self.online_dpo_group = None
            if isinstance(error, TransferStopped):
                return str(error)
            raise
        return ""

    def online_dpo_receive(self, sender: str, file: str, offset: str, chunk: str) -> None:
        """Writes a piece (base64) of a file that is being sent.

        A piece that is sent twice changes nothing. A piece behind the end of the file is dropped: the pieces before it
        went to a worker that has been replaced.
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
        """Loads the files that were sent, and deletes them.

        Incomplete files are not loaded: a worker that restarted has received only the last pieces. ``sizes`` is the
        JSON of the names of all files and their sizes in bytes.
        """
        if sender not in self.online_dpo_uploads:
            return
        folder = Path(self.online_dpo_uploads[sender].name)
        if json.loads(sizes) == {path.name: path.stat().st_size for path in folder.iterdir()}:
            self.online_dpo_load_folder(str(folder), label)
        self.online_dpo_forget_received(sender)

    def online_dpo_forget_received(self, sender: str) -> None:
        """Deletes the files of an earlier transfer that was interrupted."""
        if sender in self.online_dpo_uploads:
            self.online_dpo_uploads.pop(sender).cleanup()


def shape_of(config: Any) -> dict[str, Any]:
    """The fields of a text model's config that determine the shapes of its weights."""
    values = config.to_dict()
    return {name: values[name] for name in SHAPE_FIELDS if name in values}


def differing_shape(served: Mapping[str, Any], config: Any) -> str:
    """How the shape of a model that is served differs from that of the policy with this text config; empty if not."""
    policy = shape_of(config)
    return ", ".join(
        f"{name} {served.get(name)} there and {value} here"
        for name, value in policy.items()
        if served.get(name) != value
    )


def coarsest(dtypes: Iterable[str]) -> torch.dtype:
    """The dtype with the largest rounding error among those of the workers.

    >>> coarsest(["float32", "bfloat16"])
    torch.bfloat16
    """
    return max((getattr(torch, name) for name in dtypes), key=lambda dtype: torch.finfo(dtype).eps)


def device_name(device: torch.device) -> str:
    """A name that is the same in every process: ``cuda`` and the GPU's UUID, or another device's type (``cpu``)."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def end_loading(model: Any, config: Any) -> None:
    """Ends a reload that failed. Weights that have arrived are in place; the others are as before, or undefined.

    Without this, vLLM would continue the unfinished reload at the next one.
    """
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
        finalize_layerwise_reload,
    )

    finalize_layerwise_reload(model, config)


def renew_output_head(model: Any, pushed: set[str]) -> None:
    """Updates an output head that is tied to the input embedding, after new weights were loaded.

    Weights that come without a head are tied. vLLM ties the head only at its start, and not if the checkpoint it was
    started with had a different head. On a CPU, moreover, a head computes with a packed copy of its weight, and loading
    the embedding does not update that copy.
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
    """The same weights; adds their names to ``names`` on the way."""
    for name, tensor in weights:
        names.add(name)
        yield name, tensor


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all safetensors files of a folder, with their names."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"No safetensors files in {folder}.")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.offset_keys():
                yield name, tensors.get_tensor(name)
