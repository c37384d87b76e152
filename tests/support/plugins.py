"""What a test registers is gone after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# a registry is made when its module is imported
import online_dpo.methods
import online_dpo.objective.losses
import online_dpo.pairing.strategies
import online_dpo.rollout.registry
import online_dpo.scoring.judge_registry
import online_dpo.scoring.registry
import online_dpo.training.metric_registry  # noqa: F401
from online_dpo.config.registry import registries


@contextmanager
def names_restored() -> Iterator[None]:
    """Inside, names may be registered; afterwards they are free again."""
    for name in online_dpo.methods.METHODS:
        online_dpo.methods.METHODS[name]  # imported when it is asked for
    before = {registry.kind: set(registry) for registry in registries()}
    yield
    for registry in registries():
        for name in set(registry) - before.get(registry.kind, set()):
            registry.forget(name)
