"""One training of the comparison by quality: a trainer, ours or TRL's, on the quickstart's models and prompts.

It runs in a process and a thread of its own, and leaves checkpoints, each with the seconds of CPU time that training
has taken until then. Loading models and writing checkpoints does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RECORD, LOG = "training.json", "log.txt"
CHECKPOINTS = (10, 20, 40, 60, 80, 100, 125, 150, 200, 250, 300, 400, 500, 600, 800, 1000)
"""The steps after which a checkpoint is written; one more at the end."""
LINES_OF_LOG_SHOWN = 15
SAME = ("row", "seed", "beta", "learning_rate")
"""What a training that is kept must have in common with the one that is asked for, beside its length."""


@dataclass(frozen=True)
class Row:
    """A line of the comparison: the trainer, and its fields that are not as in `shared_settings`. ``short`` is its name
    in a chart.
    """

    title: str
    short: str
    library: str
    fields: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "trl": Row("TRL", "TRL", "trl"),
    "ours-pairs": Row("ours, K = 2", "ours, K = 2", "ours", {"num_completions": 2, "tie_policy": "first"}),
    "ours": Row("ours, K = 4", "ours, K = 4", "ours", {"num_completions": 4}),
    "trl-checkpointing": Row(
        "TRL with its default, gradient checkpointing", "default", "trl", {"gradient_checkpointing": True}
    ),
}
"""TRL trains a pair of equal scores like any other; so does ours where both are to do the same."""


@dataclass(frozen=True)
class Training:
    """What one process does. It ends after ``seconds`` of CPU time, or ``steps`` if those come first."""

    row: str
    start: str
    folder: str
    seed: int
    seconds: float
    steps: int
    beta: float
    learning_rate: float


def shared_settings(training: Training) -> dict[str, Any]:
    """The fields that both configurations have, with the same meaning: the quickstart's, but for a learning rate that
    does not fall. So a checkpoint of a run is what a shorter run would have ended with.
    """
    from online_dpo.quickstart.run import training_settings

    quickstart = training_settings()
    del quickstart["num_completions"]
    return quickstart | dict(
        output_dir=training.folder,
        seed=training.seed,
        max_steps=training.steps,
        beta=[training.beta],
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        optim="adamw_torch_fused",
        gradient_accumulation_steps=1,
        loss_type="sigmoid",
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
    )


def chat_prompts(start: Path) -> Any:
    """The training prompts as chat messages. The template makes the same tokens of them, and lets TRL show the reward
    model the end of an answer, which it leaves out of plain text.
    """
    from datasets import Dataset

    from online_dpo.quickstart.language import parse_request

    lines = (start / "prompts_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [parse_request(json.loads(line)["prompt"]).text for line in lines]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def build(training: Training) -> Any:
    """The trainer, ready for ``train()``."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    row, start = ROWS[training.row], Path(training.start)
    policy, reward_model = start / "policy", start / "reward_model"
    parts: dict[str, Any] = dict(
        model=AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1),
        train_dataset=chat_prompts(start),
        processing_class=AutoTokenizer.from_pretrained(policy),
        reward_processing_classes=AutoTokenizer.from_pretrained(reward_model),
    )
    if row.library == "trl":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    else:
        from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    return OnlineDPOTrainer(**parts, args=OnlineDPOConfig(**shared_settings(training) | row.fields))


def train(training: Training) -> None:
    """Train, and write the checkpoints and the record."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    folder = Path(training.folder)
    trainer = build(training)
    points: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.process_time()
            used = now - self.begun
            control.should_training_stop |= used >= training.seconds or state.global_step == training.steps
            if state.global_step in CHECKPOINTS or control.should_training_stop:
                name = f"step-{state.global_step}"
                trainer.save_model(str(folder / name))
                points.append({"step": state.global_step, "cpu_seconds": used, "folder": name})
                record = {"training": asdict(training), "points": points}
                (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            self.begun += time.process_time() - now

    trainer.add_callback(Clock())
    trainer.train()


def train_in_a_process(training: Training) -> list[dict[str, Any]]:
    """The points of a training, done in a process of its own unless its folder has one that is long enough.

    Raises:
        SystemExit: the process failed; its last lines are shown. Or the folder has a training with other settings.
    """
    folder = Path(training.folder)
    points = kept_points(training)
    if points is None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        with (folder / LOG).open("w") as log:
            words = [sys.executable, __file__, json.dumps(asdict(training))]
            done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        points = kept_points(training)
        if done.returncode or points is None:
            last = "\n".join((folder / LOG).read_text().splitlines()[-LINES_OF_LOG_SHOWN:])
            raise SystemExit(f"the training {training.row}, seed {training.seed}, has failed:\n{last}")
    return points


def kept_points(training: Training) -> list[dict[str, Any]] | None:
    """The points that a training's folder has, up to its last step; ``None`` where it did not get that far."""
    file = Path(training.folder) / RECORD
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    if [record["training"][name] for name in SAME] != [getattr(training, name) for name in SAME]:
        raise SystemExit(f"{training.folder} has a training with other settings: give another --folder")
    points = []
    for point in record["points"]:
        is_last = point["cpu_seconds"] >= training.seconds or point["step"] >= training.steps
        if is_last or point["step"] in CHECKPOINTS:
            points.append(point)
        if is_last:
            return points
    return None


if __name__ == "__main__":
    train(Training(**json.loads(sys.argv[1])))
