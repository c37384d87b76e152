"""A log of a training step and one of an evaluation, for tests of what displays show."""

LOGS = {
    "loss": 0.693147,
    "objective/scores": 1.25,
    "objective/kl": 0.0123456,
    "rewards/margins": -0.5,
    "perf/tokens_per_second": 12345.6,
    "learning_rate": 1e-4,
    "prompts": 8.0,
}

EVALUATION = {"eval_loss": 0.5, "eval_objective/kl": 2, "eval_win_rate": 0.75, "eval_runtime": 1.0}
