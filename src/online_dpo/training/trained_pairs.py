"""What policy and reference said of the pairs of a step, token by token, kept while the step is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from online_dpo.runs.plain_json import DIGITS
from online_dpo.training.objective_step import PairLosses
from online_dpo.types import PackedRows

SMALLEST = 1e-30
"""Of a smaller number no digit is looked at."""


@dataclass(frozen=True)
class TrainedCompletion:
    """A completion as the loss saw it: the sums of its log-probabilities, and for each token the policy's minus the
    reference's. Without a reference, what is relative to it is ``None`` or empty.

    >>> TrainedCompletion(logp=-4.1, ref_logp=-4.3, log_ratios=(0.1, 0.1))
    """

    logp: float
    ref_logp: float | None = None
    log_ratios: Sequence[float] = ()


@dataclass(frozen=True)
class TrainedPair:
    """A pair as the loss saw it. ``implied`` is the policy's implied reward margin, beta times the difference of the
    summed log-ratios; ``None`` without a reference.

    >>> TrainedPair(chosen, rejected, loss=0.68, implied=0.03)
    """

    chosen: TrainedCompletion
    rejected: TrainedCompletion
    loss: float
    implied: float | None


class TrainedPairs:
    """Keeps the figures of each pass of a step on their way to the host.

    The copy of a pass is made beside the device's work and is waited for when all is read. Where passes are made again,
    because memory ran out, what the last one says of a pair counts.
    """

    def __init__(self) -> None:
        self._passes: list[_Pass] = []

    def begin_step(self) -> None:
        """Forgets the passes of the step before."""
        self._passes = []

    def saw_pass(self, rows: PackedRows, losses: PairLosses) -> None:
        """Keeps what a forward pass said of the pairs in these rows, which need not lie on the device."""
        if rows.pairs:  # else it is a stand-in
            self._passes.append(_Pass(rows, losses))

    def read(self) -> dict[int, TrainedPair]:
        """Returns what was said of each pair of the step, by the pair's `id`."""
        return {key: pair for one in self._passes for key, pair in one.pairs()}


class _Pass:
    """The figures of one pass, in one tensor: the policy's log-probabilities by token and summed, the losses of the
    pairs, and the reference's log-probabilities if there are any.
    """

    def __init__(self, rows: PackedRows, losses: PairLosses) -> None:
        of_policy = [losses.policy.token_logps_M, losses.policy.logps_S, losses.loss_N]
        of_reference = [] if losses.reference is None else [losses.reference.token_logps_M, losses.reference.logps_S]
        parts = [part.detach() for part in (*of_policy, *of_reference)]
        self._rows, self._beta, self._sizes = rows, losses.beta, [len(part) for part in parts]
        together = torch.cat(parts)
        self._figures = together.to("cpu", non_blocking=True)
        self._copied = None if together.device.type == "cpu" else torch.Event(together.device.type)
        if self._copied is not None:
            self._copied.record()

    def pairs(self) -> Iterator[tuple[int, TrainedPair]]:
        """Yields each pair's `id` and what was said of it."""
        if self._copied is not None:
            self._copied.synchronize()
        rows, (logps_M, logps_S, loss_N, *reference) = self._rows, self._figures.split(self._sizes)
        lengths, chosen, rejected = rows.length_S.tolist(), rows.chosen_N.tolist(), rows.rejected_N.tolist()
        starts = [0, *accumulate(lengths)]
        sums, losses = logps_S.tolist(), loss_N.tolist()
        ratios = _rounded(logps_M - reference[0]).tolist() if reference else []
        ref_sums = reference[1].tolist() if reference else [None] * len(sums)

        def completion(s: int) -> TrainedCompletion:
            return TrainedCompletion(sums[s], ref_sums[s], ratios[starts[s] : starts[s] + lengths[s]])

        for n, pair in enumerate(rows.pairs):
            better, worse = completion(chosen[n]), completion(rejected[n])
            yield id(pair), TrainedPair(better, worse, losses[n], _implied(better, worse, self._beta))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """The values with as many digits as a record has, all at once."""
    exact = values.double()
    scale = 10.0 ** (DIGITS - 1 - exact.abs().clamp(min=SMALLEST).log10().floor())
    return (exact * scale).round() / scale


def _implied(chosen: TrainedCompletion, rejected: TrainedCompletion, beta: float) -> float | None:
    """Beta times the difference of the summed log-ratios; ``None`` without a reference."""
    if chosen.ref_logp is None or rejected.ref_logp is None:
        return None
    return beta * ((chosen.logp - chosen.ref_logp) - (rejected.logp - rejected.ref_logp))
