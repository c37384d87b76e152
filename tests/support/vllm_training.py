"""Training runs that sample with vLLM."""

from __future__ import annotations

import threading

from transformers import TrainerCallback

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from support import tiny, vllm_tools
from support.training import dataset, word_reward

FAMILY = "qwen2-tied"
LENGTHS = (5, 9, 3, 40, 12, 4, 6, 8, 10, 5, 2, 11)


def train(
    tmp_path,
    model=None,
    callbacks=(),
    prepare=lambda made: None,
    peft_config=None,
    reward=word_reward,
    **fields,
):
    options = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=6,
        max_steps=6,
        max_new_tokens=10,
        max_length=vllm_tools.MAX_LENGTH,
        beta=0.02,
        use_vllm=True,
    )
    made = OnlineDPOTrainer(
        model=model or vllm_tools.policy(FAMILY, sharpness=1.0),
        reward_funcs=reward,
        args=OnlineDPOConfig(**{**options, **fields}),
        train_dataset=dataset(lengths=LENGTHS),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    prepare(made)
    made.train()
    return [entry for entry in made.state.log_history if "pairs/count" in entry]


def check(log, steps=6, staleness=None):
    """Sampled with the latest weights, trained, and nothing lost."""
    assert len(log) == steps
    for step, entry in enumerate(log):
        behind = staleness[step] if staleness else 0
        assert entry["sampling/staleness"] == behind
        gap = entry["sampling/sampling_logp_difference/mean"]
        assert gap < 1e-4 if behind == 0 else gap > 1e-3
        assert entry["prompts"] == 6
        assert entry["prompts"] == entry["pairs/count"] + sum(v for k, v in entry.items() if k.startswith("dropped/"))
    assert abs(log[-1]["objective/kl"]) > 0.01


class RestartServer(TrainerCallback):
    """Kills the server after the second step, and starts it again in another thread a while later."""

    def __init__(self, server):
        self.server = server

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.server.kill()
            self.again = threading.Timer(3.0, self.server.start)
            self.again.start()
