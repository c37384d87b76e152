"""The quickstart's rubric as a reward function: what its answers are worth, as nothing that is trained on knows it."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.quickstart.rubric import rubric


def rubric_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The rubric's points for each completion, at most 8."""
    return [rubric(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
