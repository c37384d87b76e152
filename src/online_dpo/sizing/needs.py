"""The memory that one GPU needs, and its machine for it."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.sizing.held import Term, held_terms
from online_dpo.sizing.passing import pass_terms, sampling_terms, step_terms
from online_dpo.sizing.plan import Plan


@dataclass(frozen=True)
class Needs:
    """The parts of the memory of one GPU.

    ``held`` stays; ``sampling``, ``training`` (passes) and ``stepping`` take turns: what the built-in engine keeps, it
    frees when a pass does not fit. vLLM in process stays as well, unless it sleeps.
    """

    held: tuple[Term, ...]
    sampling: tuple[Term, ...]
    training: tuple[Term, ...]
    stepping: tuple[Term, ...]

    @property
    def gpu(self) -> int:
        """Bytes of one GPU at the fullest moment of a step, without the CUDA context and what the allocator loses."""
        parts = (self.held, self.sampling, self.training, self.stepping)
        held, sampling, training, stepping = (sum(term.gpu for term in terms) for terms in parts)
        training = max(training, stepping)
        stays = any(term.name == "vLLM" for term in self.sampling)
        return held + (sampling + training if stays else max(sampling, training))

    @property
    def host(self) -> int:
        """Bytes of the machine's memory for one GPU."""
        return sum(term.host for term in (*self.held, *self.sampling, *self.training))


def memory_needs(plan: Plan) -> Needs:
    """Returns what one GPU needs.

    >>> memory_needs(Plan(MODELS["7B"], "fsdp2", gpus=8)).gpu / 2**30
    """
    terms = (tuple(held_terms(plan)), tuple(sampling_terms(plan)), tuple(pass_terms(plan)), tuple(step_terms(plan)))
    return Needs(*(tuple(term for term in part if term.gpu or term.host) for part in terms))
