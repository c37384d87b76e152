"""The run's models, loaded as the run does."""

from __future__ import annotations

from collections.abc import Iterator

from online_dpo.doctor.case import Case
from online_dpo.doctor.checks.device import count_of
from online_dpo.doctor.findings import Finding, ok
from online_dpo.doctor.registry import check


@check("models", loads_models=True)
def models(case: Case) -> Iterator[Finding]:
    """Loads policy, reference and reward models as the run does, and builds its trainer."""
    trainer = case.trainer
    trained = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    yield ok(f"loaded: {count_of(trained)} weights are trained; the reference is {trainer.reference.description}")
