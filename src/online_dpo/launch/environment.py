"""The environment variables of processes on a cluster: what they get from the command, and their place among the ranks.

Pure: Ray is not imported here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase

PASSED_ON = (
    *("HF_*", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "ACCELERATE_*"),
    *("TORCH_*", "TORCHDYNAMO_*", "PYTORCH_*", "NCCL_*", "GLOO_*", "UCX_*", "OMP_*", "MKL_*"),
    *("VLLM_*", "DS_ACCELERATOR", "WANDB_*", "MLFLOW_*", "TRACKIO_*", "COMET_*", "*_API_KEY"),
    *("PYTHONPATH", "TMPDIR", "ONLINE_DPO_*"),
)
"""Variables that all processes get as they are where the command runs."""

NOT_PASSED_ON = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("VLLM_HOST_IP", "VLLM_PORT"),
)
"""Variables of launchers and of one machine, of which each process gets its own."""


def passed_on(here: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """The variables to pass on: `PASSED_ON`, and those that the run names."""
    patterns = [*PASSED_ON, *more]
    return {
        name: value
        for name, value in here.items()
        if name not in NOT_PASSED_ON and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def of_process(there: Mapping[str, str], passed: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process: those of its machine but Ray's own and a launcher's, and those that are passed on."""
    kept = {name: value for name, value in there.items() if not name.startswith("RAY_") and name not in NOT_PASSED_ON}
    return {**kept, **passed}


def in_order_of_ranks(nodes: Sequence[Hashable]) -> list[int]:
    """The workers in the order of their ranks: those of one machine follow each other, as launchers count them.

    >>> in_order_of_ranks(["a", "b", "a"])
    [0, 2, 1]
    """
    first = {node: index for index, node in reversed([*enumerate(nodes)])}
    return sorted(range(len(nodes)), key=lambda index: (first[nodes[index]], index))


def rank_variables(
    nodes: Sequence[Hashable], rank: int, address: str, port: int, *, one_gpu_each: bool
) -> dict[str, str]:
    """The variables by which torchrun tells a process its place. One that trains alone has none of them.

    Args:
        nodes: the machine of each rank.
        address: of the machine of rank 0.
        one_gpu_each: each process sees one GPU alone, its first. Libraries take LOCAL_RANK for the number of the GPU.
    """
    if len(nodes) == 1:
        return {}
    on_node = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(nodes)),
        "LOCAL_RANK": "0" if one_gpu_each else str(on_node.index(rank)),
        "LOCAL_WORLD_SIZE": "1" if one_gpu_each else str(len(on_node)),
        "GROUP_RANK": str(list(dict.fromkeys(nodes)).index(nodes[rank])),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
