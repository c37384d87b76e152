"""The named groups in which a run's charts stand."""

from __future__ import annotations

from collections.abc import Iterable

GROUPS = {
    "Quality": (
        ("objective/scores", "objective/trained_scores", "objective/rlhf", "objective/non_score", "scores/", "rewards/")
        + ("opponent/", "val/", "agreement/", "completions/")
    ),
    "Evaluation": ("eval_",),
    "Divergence": ("objective/kl", "objective/entropy", "objective/token_entropy", "logps/", "beta"),
    "Pairs": ("pairs/", "dropped/", "prompts", "resample/", "objective/scores_margin")
    + ("completions/chosen", "completions/rejected"),
    "Judge": ("judge/",),
    "Optimization": ("loss", "grad_norm", "learning_rate", "epoch", "train", "guard/", "train/"),
    "Speed": ("time/", "perf/", "sampling/", "eval_runtime", "eval_samples_per", "eval_steps_per", "train_runtime")
    + ("train_samples_per", "train_steps_per", "train_tokens_per", "num_input_tokens", "total_flos"),
    "Memory": ("perf/device_memory", "perf/gpu_", "perf/host_memory", "perf/memory"),
}
"""Beginnings of metrics' names by group; the longest that fits decides."""

OTHER = "Other"
FIRST = ("objective/scores", "rewards/margins", "rewards/accuracies", "objective/kl", "completions/mean_length", "loss")
"""What stands first in its group."""

HIDDEN = ("time", "epoch")
"""When a row was written is no metric; the epoch grows with the step."""

HEADLINES = {
    "objective/scores": "Score",
    "rewards/margins": "Margin",
    "rewards/accuracies": "Accuracy",
    "eval_win_rate": "Win rate",
    "objective/kl": "KL",
    "completions/mean_length": "Length",
    "loss": "Loss",
}
"""Metrics in the table of all runs, and the titles of their columns."""


def group_of(metric: str) -> str:
    """The group of a metric."""
    fitting = {beginning: name for name, all_ in GROUPS.items() for beginning in all_ if metric.startswith(beginning)}
    return fitting[max(fitting, key=len)] if fitting else OTHER


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics by group, in the groups' order, without groups that have none."""
    found: dict[str, list[str]] = {name: [] for name in (*GROUPS, OTHER)}
    for metric in sorted(set(metrics) - set(HIDDEN)):
        found[group_of(metric)].append(metric)
    for members in found.values():
        members.sort(key=lambda metric: FIRST.index(metric) if metric in FIRST else len(FIRST))
    return {name: members for name, members in found.items() if members}
