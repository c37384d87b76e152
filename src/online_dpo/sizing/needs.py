"""The memory that one GPU needs, and its machine for it."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.sizing.held import Term, held_terms
from online_dpo.sizing.passing import pass_terms, sampling_terms, scoring_terms, step_terms
from online_dpo.sizing.plan import Plan

LIBRARIES = 768 * 2**20
"""What a process takes of the machine with its libraries loaded: benchmarks/memory_estimate.py measures it."""


@dataclass(frozen=True)
class Needs:
    """The parts of the memory of one GPU.

    ``held`` stays; ``sampling``, ``scoring``, ``training`` (passes) and ``stepping`` take turns: what the built-in
    engine keeps, it frees when a pass does not fit. vLLM in process stays as well, unless it sleeps.
    """

    held: tuple[Term, ...]
    sampling: tuple[Term, ...]
    training: tuple[Term, ...]
    stepping: tuple[Term, ...]
    scoring: tuple[Term, ...] = ()

    @property
    def gpu(self) -> int:
        """Bytes of one GPU at the fullest moment of a step, without the CUDA context and what the allocator loses."""
        parts = (self.held, self.sampling, self.training, self.stepping, self.scoring)
        held, sampling, training, stepping, scoring = (sum(term.gpu for term in terms) for terms in parts)
        training = max(training, stepping, scoring)
        stays = any(term.name == "vLLM" for term in self.sampling)
        return held + (sampling + training if stays else max(sampling, training))

    @property
    def host(self) -> int:
        """Bytes of the machine's memory for one GPU."""
        return sum(term.host for term in (*self.held, *self.sampling, *self.training))

    @property
    def process(self) -> int:
        """Bytes of one process that computes on a CPU, beside its libraries."""
        return self.gpu + self.host

    def phases(self) -> dict[str, int]:
        """The bytes of what is held and, beside it, of each phase, by name."""
        names = ("held", "sampling", "scoring", "training", "stepping")
        return {name: sum(term.gpu + term.host for term in getattr(self, name)) for name in names}


def memory_needs(plan: Plan) -> Needs:
    """Returns what one GPU needs.

    >>> memory_needs(Plan(MODELS["7B"], "fsdp2", gpus=8)).gpu / 2**30
    """
    terms = (held_terms(plan), sampling_terms(plan), pass_terms(plan), step_terms(plan), scoring_terms(plan))
    return Needs(*(tuple(term for term in part if term.gpu or term.host) for part in terms))
