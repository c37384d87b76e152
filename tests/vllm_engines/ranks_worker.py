"""Run by torchrun: two ranks sync a sharded model and sample for themselves. Saves what each found.

Arguments: a folder for the results, the address of a server or ``colocate``, and how a server gets the weights.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from online_dpo.errors import OnlineDPOError, RolloutServerError
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import tiny, vllm_tools

FAMILY = "qwen2-tied"
KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))


def changed_policy(version):
    model = vllm_tools.policy(FAMILY)
    vllm_tools.change_weights(model, version)
    return model


def make_forget(url: str) -> None:
    """An empty folder is an error, and leaves a server without weights that it could name."""
    with TemporaryDirectory() as folder:
        try:
            VLLMClient(url, 30.0).rpc("online_dpo_load_folder", folder, "of another")
        except RolloutServerError as error:
            assert "No safetensors files" in str(error)


@contextmanager
def small_files(rank: int) -> Iterator[None]:
    """The first rank cannot write large files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def main(out: Path, where: str, transfer: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.set_num_threads(1)
    served = dict(use_vllm=True, vllm_mode="server", vllm_weight_transfer=transfer, vllm_group_port=0)
    args = vllm_tools.arguments(**({} if where == "colocate" else served))
    options = {"enforce_eager": True, "block_size": vllm_tools.BLOCK}
    if where == "colocate":
        engine = VLLMColocateEngine(vllm_tools.policy(FAMILY), tiny.tokenizer(), args, options)
    else:
        engine = VLLMServerEngine([where], tiny.tokenizer(), args)
    prompts = tiny.prompts((3, 40, 70, 9))[2 * rank : 2 * rank + 2]
    errors, versions = [], []
    for version in (1, 2):
        sharded = changed_policy(version)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        if where != "colocate" and version == 2:  # a failure on the first rank ends the sync on both, and all goes on
            with (
                pytest.raises(OnlineDPOError, match="Another process" if rank else "File too large"),
                small_files(rank),
            ):
                engine.sync(sharded, version)
        engine.sync(sharded, version)
        if where != "colocate" and version == 2:  # a server that has lost our weights, seen by both at the same time
            if rank == 0:
                make_forget(where)
            distributed.barrier()
        groups = engine.generate(prompts, 3, PARAMS, KEY)
        errors.append(vllm_tools.largest_error(changed_policy(version), groups))
        versions += [c.policy_version for g in groups for c in g.completions]
        distributed.barrier()
    torch.save({"errors": errors, "versions": versions, "rows": [g.prompt.row for g in groups]}, out / f"{rank}.pt")
    failure = ""
    if where != "colocate":  # an error of the first rank reaches the other
        try:
            engine.sync(vllm_tools.policy(FAMILY, intermediate_size=192), 3)
        except ValueError as error:
            failure = str(error)
        assert "serves another model" in failure
    engine.close()
    assert distributed.is_initialized()  # the trainer's process group is not vLLM's to end
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
