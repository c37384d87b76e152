"""Makes ``docs/reference/metrics.md``: every metric, as it is described beside the code that records it.

``python -m online_dpo.training.metrics.page > docs/reference/metrics.md``
"""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.stats.catalogue import CATALOGUE, Metric
from online_dpo.training.display.figures import in_order

SECTIONS = (
    *("Loss and objective", "Implicit rewards", "Prompts", "Pairs", "Completions", "Scores", "Judges", "Sampling"),
    *("Time", "Speed", "Memory and devices", "Guards and weights", "Evaluation", "Of transformers.Trainer"),
)
"""Titles in the order of the page."""

INTRODUCTION = """\
# Metrics

<!-- Made from the descriptions that stand beside the code by `make pages`: change them there. -->

Figures of training logs cover everything since the last log, over all ranks: means weigh each value the same, counts
are sums. What of a skipped step is NaN or infinite is left out, and a metric without any value is absent. None changes
with padding. All are in `trainer.state.log_history`, in each checkpoint's `trainer_state.json`, and where `report_to`
sends them ([Guide](../guides/watching.md#trackers)). Parts in capitals stand for names: of a reward, of a reason.

**Look at these first**: `objective/scores` against `objective/kl` (is it worth the distance?),
`completions/mean_length` and `completions/score_length_correlation` (better or only longer?), `pairs/usable_ratio` and
`dropped/*` (why is sampling wasted?), `completions/distinct_2` (do answers become alike?), `judge/position_bias`,
`eval_win_rate` and `eval_gold_score` (does it hold elsewhere?), `time/share/*` (what is slow?), `perf/gpu_utilization`.

What holds: `prompts` equals `pairs/groups` plus all `dropped/*`. `rewards/margins` is `rewards/chosen` minus
`rewards/rejected`; `objective/rlhf_reward` is `objective/trained_scores` plus `objective/non_score_reward`, which is
-beta times `objective/kl`; `val/contain_eos_token` and `completions/clipped_ratio` add up to 1. `rewards/*` and
`logps/*` are means over pairs, a completion in two pairs counting twice; KL and entropy count it once. KL, entropy and
`rewards/*` cover the completions that are trained on, `eval_objective/kl` every sampled one. With a judge alone there
are no scores, so the metrics made of them are absent. Rows that a data loader repeats to give all processes equally
many are left out.

Reward functions add metrics of their own through `log_metric`, plugins through `@metric`
([Extending](../project/extending.md)). With several held-out datasets, evaluations
have the name in it: `eval_NAME_loss`."""

HEADER = """\
| metric | unit | formula | what it tells |
|---|---|---|---|"""


def metrics_page() -> str:
    """Return the page. The modules that record metrics must have been imported."""
    left_out = sorted(CATALOGUE.keys() - set(SECTIONS))
    assert not left_out, f"sections without a place on the page: {left_out}"
    tables = ["\n".join([f"## {title}", "", HEADER, *map(_row, _in_order(CATALOGUE[title]))]) for title in SECTIONS]
    return "\n\n".join([INTRODUCTION, *tables]) + "\n"


def _in_order(metrics: Sequence[Metric]) -> list[Metric]:
    """As in logs, whatever order their modules are imported in."""
    return list(in_order({metric.name.removeprefix("eval_"): metric for metric in metrics}).values())


def _row(metric: Metric) -> str:
    formula = metric.formula + (f"; only {metric.when}" if metric.when else "")
    cells = (f"`{metric.name}`", metric.unit, formula, metric.tells)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    import online_dpo.training.trainer  # noqa: F401  (it records all metrics, or imports what does)

    print(metrics_page(), end="")
