"""Short real training runs, for the integration tests."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import TrainerCallback

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from support import tiny

LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8, 10, 5, 2, 11)
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def word_reward(completions, **_):
    """Counts words w0 to w9: a score with both ties and differences."""
    return [float(sum(len(word) == 2 for word in text.split())) for text in completions]


def recording(calls):
    """`word_reward`, which adds to ``calls`` what it sees of each completion: prompt, text, token ids and name."""

    def reward(prompts, completions, completion_ids, name, **_):
        calls.append(list(zip(prompts, completions, completion_ids, name, strict=True)))
        return word_reward(completions)

    return reward


class LongerIsBetter:
    """A judge that counts words and keeps what it was asked; texts of equal length have no preference."""

    def __init__(self):
        self.prompts, self.pairs = [], []

    def judge(self, prompts, completion_pairs, shuffle_order=True):
        self.prompts += prompts
        self.pairs += completion_pairs
        lengths = [(len(a.split()), len(b.split())) for a, b in completion_pairs]
        return [-1 if a == b else int(b > a) for a, b in lengths]


def dataset(lengths=LENGTHS, **columns):
    rows = [{"prompt": prompt.content, "name": f"row {prompt.row}"} for prompt in tiny.prompts(lengths)]
    return Dataset.from_list([row | {k: v[i] for k, v in columns.items()} for i, row in enumerate(rows)])


def config(tmp_path, **fields):
    defaults = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        max_steps=1,
        max_new_tokens=8,
        max_length=64,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        overwrite_output_dir=True,
    )
    return OnlineDPOConfig(**{**defaults, **fields})


def trainer(tmp_path, model=None, reward_funcs=word_reward, train_dataset=None, kwargs=None, **fields):
    """A trainer with a tiny Llama; ``fields`` are configuration fields, ``kwargs`` further arguments."""
    return OnlineDPOTrainer(
        model=model if model is not None else tiny.causal_lm(sharpness=1.0),
        reward_funcs=reward_funcs,
        args=config(tmp_path, **fields),
        train_dataset=train_dataset if train_dataset is not None else dataset(),
        processing_class=tiny.tokenizer(),
        **(kwargs or {}),
    )


class KeepGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient(tmp_path, **options):
    """The gradient that the optimizer receives in the run's last step (of one, unless `max_steps` says otherwise)."""
    keep = KeepGradient()
    made = trainer(tmp_path, optim="sgd", **options)
    made.callback_handler.callbacks.insert(0, keep)
    made.train()
    return keep.last


def assert_same(got, expected, rtol):
    """Equal relative to the size of each tensor."""
    assert got.keys() == expected.keys()
    for name in expected:
        size = expected[name].norm()
        error = (got[name] - expected[name]).norm()
        assert error <= rtol * size + 1e-9, f"{name}: error {error / size:.2e} of its norm {size:.2e}"
    assert sum(e.norm() for e in expected.values()) > 1e-3


def step_logs(made):
    """The log entries of optimizer steps, also of those that had no pair to train on."""
    return [log for log in made.state.log_history if "pairs/count" in log]


def without_times(log):
    """A log entry without what differs from run to run."""
    return {name: value for name, value in log.items() if not name.startswith(("time/", "perf/"))}


def train_logs(made):
    """The log entries of optimizer steps that trained, not those of evaluations or of the end of the run."""
    return [log for log in made.state.log_history if "loss" in log]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
