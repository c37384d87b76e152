"""What each process takes of a cluster, and what a cluster lacks for it. Pure: Ray is not imported here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from online_dpo.launch.settings import RaySettings

TRAINER, SERVER = "trainer", "server"
KINDS = ("GPU", "CPU")
"""The resources that processes take, in the order of messages."""


@dataclass(frozen=True)
class Bundle:
    """What one process takes: all of it on one machine.

    >>> Bundle("server", 0, gpus=2, cpus=1)
    """

    role: str
    number: int
    gpus: int
    cpus: int

    @property
    def resources(self) -> dict[str, float]:
        """The resources by Ray's names, without those of which it takes nothing."""
        return {kind: float(amount) for kind, amount in (("GPU", self.gpus), ("CPU", self.cpus)) if amount}


def bundles_of(settings: RaySettings) -> list[Bundle]:
    """The bundles of a run: those of the trainers, then those of the servers."""
    gpus = int(settings.train_gpus > 0)
    trainers = [Bundle(TRAINER, number, gpus, settings.cpus_per_trainer) for number in range(settings.trainers)]
    servers = [
        Bundle(SERVER, number, settings.server_gpus, settings.cpus_per_server) for number in range(settings.servers)
    ]
    return trainers + servers


def shortfall(
    bundles: Sequence[Bundle],
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
    placed: Sequence[Bundle] = (),
) -> str:
    """What is wanted, what the cluster has, and what it lacks, in one sentence each.

    Args:
        nodes: the resources of each machine of the cluster.
        free: those of all machines together that are not in use.
        placed: the bundles that have their place already.

    >>> shortfall([Bundle("trainer", 0, gpus=1, cpus=0)], [{"CPU": 8}], {"CPU": 8})
    'Wanted: 1 GPU (1 trainer with 1 GPU). The cluster has no GPU and 8 CPUs on 1 node. Lacking: 1 GPU.'
    """
    total = _sum(nodes)
    usable = _sum([free, *(bundle.resources for bundle in placed)])
    has = f"{_amounts(total, KINDS)} on {_counted(len(nodes), 'node')}"
    return f"Wanted: {_wanted(bundles)}. The cluster has {has}. Lacking: {_lacking(bundles, total, usable)}."


def _wanted(bundles: Sequence[Bundle]) -> str:
    kinds = Counter((bundle.role, bundle.gpus, bundle.cpus) for bundle in bundles)
    parts = [
        f"{_counted(count, role)} with {_amounts({'GPU': gpus, 'CPU': cpus})}{' each' if count > 1 else ''}"
        for (role, gpus, cpus), count in kinds.items()
    ]
    return f"{_amounts(_sum([bundle.resources for bundle in bundles]))} ({', '.join(parts)})"


def _lacking(bundles: Sequence[Bundle], total: Mapping[str, float], usable: Mapping[str, float]) -> str:
    """What there is too little of: at all, or not in use by others, or on one machine."""
    wanted = _sum([bundle.resources for bundle in bundles])
    if short := {kind: amount - total[kind] for kind, amount in wanted.items() if amount > total[kind]}:
        return _amounts(short)
    if busy := {kind: amount - usable[kind] for kind, amount in wanted.items() if amount > usable[kind]}:
        return f"{_amounts(busy)}, in use by other jobs"
    largest = max(bundles, key=lambda bundle: (bundle.gpus, bundle.cpus))
    return f"a node with {_amounts(largest.resources)} free at once: what is free lies on several nodes"


def _sum(many: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: sum(amounts.get(kind, 0) for amounts in many) for kind in KINDS}


def _amounts(amounts: Mapping[str, float], shown: Sequence[str] = ()) -> str:
    """Amounts in words: ``2 GPUs and 1 CPU``. Of the kinds in ``shown``, 0 is said as well."""
    parts = [_counted(amounts[kind], kind) for kind in KINDS if amounts.get(kind) or kind in shown]
    return " and ".join(parts) or "nothing"


def _counted(count: float, what: str) -> str:
    return f"{f'{count:g}' if count else 'no'} {what}{'' if count in (0, 1) else 's'}"
