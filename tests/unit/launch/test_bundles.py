"""What each process takes of a cluster, and the message where a cluster lacks it."""

import pytest

from online_dpo.launch.bundles import Bundle, bundles_of, shortfall
from online_dpo.launch.settings import RaySettings


def test_trainers_take_a_gpu_each_and_servers_theirs():
    bundles = bundles_of(RaySettings(train_gpus=2, servers=1, gpus_per_server=4, cpus_per_server=3))
    assert [bundle.resources for bundle in bundles] == [{"GPU": 1, "CPU": 1}] * 2 + [{"GPU": 4, "CPU": 3}]
    assert [(bundle.role, bundle.number) for bundle in bundles] == [("trainer", 0), ("trainer", 1), ("server", 0)]


def test_without_gpus_nothing_takes_one():
    bundles = bundles_of(RaySettings(train_workers=2, servers=1, cpus_per_trainer=4))
    assert [bundle.resources for bundle in bundles] == [{"CPU": 4}, {"CPU": 4}, {"CPU": 1}]


EIGHT = [Bundle("trainer", number, gpus=1, cpus=1) for number in range(8)]
SERVERS = [Bundle("server", number, gpus=1, cpus=1) for number in range(2)]
PAIR = [Bundle("server", 0, gpus=2, cpus=1)]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "bundles, nodes, free, placed, message",
    [
        (
            EIGHT + SERVERS,
            [{"GPU": 4, "CPU": 32}] * 2,
            {"GPU": 8, "CPU": 64},
            [],
            "Wanted: 10 GPUs and 10 CPUs (8 trainers with 1 GPU and 1 CPU each, 2 servers with 1 GPU and 1 CPU each). "
            "The cluster has 8 GPUs and 64 CPUs on 2 nodes. Lacking: 2 GPUs.",
        ),
        (
            EIGHT,
            [{"CPU": 2.0, "memory": 5e9}],
            {"CPU": 2.0},
            [],
            "Wanted: 8 GPUs and 8 CPUs (8 trainers with 1 GPU and 1 CPU each). The cluster has no GPU and 2 CPUs on 1 "
            "node. Lacking: 8 GPUs and 6 CPUs.",
        ),
        (
            SERVERS,
            [{"GPU": 4, "CPU": 32}],
            {"GPU": 1, "CPU": 32},
            [],
            "Wanted: 2 GPUs and 2 CPUs (2 servers with 1 GPU and 1 CPU each). The cluster has 4 GPUs and 32 CPUs on 1 "
            "node. Lacking: 1 GPU, in use by other jobs.",
        ),
        (
            PAIR,
            [{"GPU": 1, "CPU": 8}] * 2,
            {"GPU": 2, "CPU": 16},
            [],
            "Wanted: 2 GPUs and 1 CPU (1 server with 2 GPUs and 1 CPU). The cluster has 2 GPUs and 16 CPUs on 2 nodes. "
            "Lacking: a node with 2 GPUs and 1 CPU free at once: what is free lies on several nodes.",
        ),
    ],
)
def test_the_message_says_what_is_wanted_what_is_there_and_what_lacks(bundles, nodes, free, placed, message):
    assert shortfall(bundles, nodes, free, placed) == message


def test_what_the_run_holds_already_is_not_in_use_by_others():
    nodes, free = [{"GPU": 3, "CPU": 8}], {"GPU": 0, "CPU": 6}
    assert "Lacking: 1 GPU, in use by other jobs." in shortfall(EIGHT[:3], nodes, free, placed=EIGHT[:2])
