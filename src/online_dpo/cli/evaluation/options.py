"""Options of ``online-dpo eval``, beside the fields of a run file. Each is documented once, beneath it.

``schema.py`` reads this file's text. Nothing heavy may be imported here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """What ``online-dpo eval`` needs beside the fields of a run file."""

    model: str | None = None
    """Folder or hub name of the model to evaluate. When not set, the run's `output_dir`."""

    against: str | None = None
    """Folder or hub name of the model that it is compared with. When not set, the run's reference model, or else the
    model that the run began with."""

    prompts: str | None = None
    """Held-out prompts: a file, folder or hub name, as `dataset_name`. When not set, those that the run evaluates
    on."""

    limit: int | None = None
    """Evaluate on this many prompts at most. When not set, the run's `eval_limit`."""

    reward: list[str] | None = None
    """What scores the answers, in place of the run's scorers: folders or hub names of reward models, functions as
    `file.py:function` or `package.module:function`. Several are added up."""

    samples: int = 1
    """Answers of each model to each prompt."""

    greedy: bool = False
    """Answer with the most probable token each time, in place of sampling."""

    kl: bool | None = None
    """Estimate the KL of the model to the other. When not set: where both have the same vocabulary."""

    json: str | None = None
    """File to write the figures to."""

    output: str | None = None
    """File to write prompts, answers, scores and preferences to, as jsonl with one pair of answers a line. It is
    written before anything is scored, too: where scoring fails, it holds the answers."""


RUN_FIELDS = (
    *("judge", "judge_kwargs", "dataset_config", "dataset_test_split", "dataset_types"),
    *("prompt_column", "prompt_template", "chat_template_kwargs", "invalid_prompts", "truncate_prompts"),
    *("max_new_tokens", "max_length", "max_prompt_length"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
    *("rollout_batch_size", "max_tokens_per_pass", "dataset_num_proc", "seed"),
    *("reward_weights", "reward_batch_size", "missing_eos_penalty", "length_penalty", "share_prompts"),
    *("dtype", "attn_implementation", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"),
    *("use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    *("model_init_kwargs", "trust_remote_code", "bf16", "fp16", "use_cpu", "plugins"),
)
"""Fields of a run file that an evaluation reads, from the file or from the command line."""

CALLED_HERE = {
    "model_name_or_path": "model",
    "checkpoint": "model",
    "policy": "model",
    "baseline": "against",
    "ref_model": "against",
    "reference": "against",
    "opponent": "against",
    "dataset": "prompts",
    "data": "prompts",
    "test_set": "prompts",
    "max_samples": "limit",
    "max_prompts": "limit",
    "reward_model": "reward",
    "reward_func": "reward",
    "scorer": "reward",
    "n": "samples",
    "num_generations": "samples",
    "num_completions": "samples",
    "num_samples": "samples",
    "do_sample": "greedy",
    "batch_size": "rollout_batch_size",
    "per_device_eval_batch_size": "rollout_batch_size",
    "judge_model": "judge_kwargs",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "output_file": "output",
    "output_path": "output",
    "json_file": "json",
    "split": "dataset_test_split",
    "torch_dtype": "dtype",
    "precision": "dtype",
}
"""What options of an evaluation are called elsewhere."""

FROM_THE_RUN = (
    *("model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name", "eval_limit", "output_dir"),
    *("reward_funcs", "reward_model_path", "eval_reward_funcs", "eval_reward_model_path"),
    *("eval_judge", "eval_judge_kwargs", "model_revision"),
)
"""Fields that it takes from the file alone: on the command line, options of its own stand in their place."""
