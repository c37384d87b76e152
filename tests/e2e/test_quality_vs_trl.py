"""The comparison of gold scores with TRL runs on models that know next to nothing, with equal settings of both."""

import json
import sys
from pathlib import Path

import pytest

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.models import TINY

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality_runs  # noqa: E402
from quality_curves import compared, tables  # noqa: E402
from quality_runs import ROWS, Training  # noqa: E402
from quality_scores import HeldOut, scored  # noqa: E402

SAME = (
    *("beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "seed", "max_new_tokens", "max_length", "temperature", "top_p", "min_p", "repetition_penalty"),
    *("missing_eos_penalty", "loss_type", "bf16", "fp16", "gradient_checkpointing", "disable_dropout", "use_cpu"),
    *("generation_kwargs", "cache_implementation", "reward_weights"),
)


def test_both_trainers_with_equal_settings(tmp_path):
    pytest.importorskip("trl")
    build(tmp_path / "start", size=TINY)
    curves, settings, order = {}, {}, {}
    for row in ("trl", "ours-pairs"):
        training = Training(row, str(tmp_path / "start"), str(tmp_path / row), 3, 1e9, 2, 0.2, 5e-4)
        (tmp_path / row).mkdir()
        trainer = quality_runs.build(training)
        order[row] = [prompt for batch in trainer.get_train_dataloader() for prompt in texts_of(batch)]
        settings[row] = {name: getattr(trainer.args, name) for name in SAME}
        del trainer
        quality_runs.train(training)
        points = quality_runs.kept_points(training)
        assert points is not None and [point["step"] for point in points] == [2] and points[0]["cpu_seconds"] > 0
        curves[row] = {"3": scored(points, tmp_path / "start", tmp_path / row, HeldOut(8))}
    assert settings["trl"] == settings["ours-pairs"]
    assert order["trl"] == order["ours-pairs"] and len(order["trl"]) == TINY.prompts_train

    starts = [by_seed["3"][0] for by_seed in curves.values()]
    assert starts[0] == starts[1] and starts[0]["kl"]["value"] == 0.0
    for by_seed in curves.values():
        last = by_seed["3"][-1]
        assert last["kl"]["value"] != 0.0 and last["gold"]["low"] <= last["gold"]["value"] <= last["gold"]["high"]
    found = compared(curves)
    assert found["seconds_a_step"]["trl"] == curves["trl"]["3"][-1]["cpu_seconds"] / 2
    rows = {name: {"title": ROWS[name].title} for name in curves}
    assert "| CPU seconds of training | TRL | ours, K = 2 |" in tables(
        {"rows": rows, "points": curves, "comparison": found}
    )

    again = Training("trl", str(tmp_path / "start"), str(tmp_path / "trl"), 3, 1e9, 3, 0.2, 5e-4)
    assert quality_runs.kept_points(again) is None  # it is longer
    with pytest.raises(SystemExit, match="other settings"):
        quality_runs.kept_points(
            Training(**json.loads((tmp_path / "trl" / "training.json").read_text())["training"] | {"beta": 1.0})
        )


def texts_of(batch):
    """The requests of a batch, whichever trainer's."""
    return [message["content"] if isinstance(message, dict) else message for message in contents(batch)]


def contents(batch):
    prompts = batch["prompt"] if isinstance(batch, dict) else [prompt.content for prompt in batch]
    return [prompt[0] for prompt in prompts]
