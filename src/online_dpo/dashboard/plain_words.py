"""Facts of a group in plain words: why it gave no pair, and what a log-ratio looks like."""

from __future__ import annotations

from bisect import bisect

REASONS = {
    "tie": "The best and the worst completion have the same score, so none is better.",
    "identical": "All completions are the same text.",
    "missing_score": "Fewer than two completions have a score: a scorer gave none, or none that is finite.",
    "no_answer": "The judge gave no usable answer, so it is not known which completion is better.",
    "contradiction": "The judge preferred one completion in one order and the other one in the other order.",
    "margin": "The scores differ by less than `min_margin` or by more than `max_margin` allows.",
    "length_ratio": "One completion is longer than `max_length_ratio` times the other.",
    "resampled": "It gave no pair, so the prompt was answered again: see the next round.",
    "not_said": "A method from outside does not say of which prompts its reasons are.",
}
LEFT_OUT = {
    "margin": "left out because of their margin (`min_margin`, `max_margin`)",
    "length_ratio": "left out because of their lengths (`max_length_ratio`)",
}
STEPS = (0.05, 0.2, 0.5, 1.0)
"""Sizes of a log-ratio at which its colour changes."""


def why_no_pair(reason: str, resampled_for: str = "") -> str:
    """A sentence on why a group gave no pair."""
    if not reason:
        return "The record says no reason."
    sentence = REASONS.get(reason, f"The reason is recorded as “{reason}”.")
    if resampled_for:
        sentence += f" What its answers lacked: {REASONS.get(resampled_for, resampled_for)}"
    return sentence


def why_left_out(reason: str, count: float | None) -> str:
    """A sentence on pairs that limits excluded."""
    number = f"{int(count or 0)} pair{'' if count == 1 else 's'}"
    return f"{number} {LEFT_OUT.get(reason, f'left out ({reason})')}."


def ratio_class(ratio: float | None) -> str:
    """The class of a token's colour, from ``r-4`` (the reference gives it much more) to ``r4`` (the policy does)."""
    size = bisect(STEPS, abs(ratio)) if ratio is not None else 0
    return f"r{-size if ratio is not None and ratio < 0 else size}"
