"""The options of ``online-dpo eval`` that are not fields of a run file. Each is documented beneath its definition.

``schema.py`` reads the text of this file. Heavy packages must not be imported here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """The options of ``online-dpo eval`` that are not fields of a run file."""

    model: str | None = None
    """Folder or hub name of the model to evaluate. When not set, the run's `output_dir`."""

    against: str | None = None
    """Folder or hub name of the model to compare with. When not set, the run's reference model, or else the model that
    the run began with."""

    prompts: str | None = None
    """Held-out prompts: a file, folder or hub name, as `dataset_name`. When not set, the run's evaluation prompts."""

    limit: int | None = None
    """Evaluate on this many prompts at most. When not set, the run's `eval_limit`."""

    reward: list[str] | None = None
    """Scorers of the answers, instead of the run's scorers: folders or hub names of reward models, or functions as
    `file.py:function` or `package.module:function`. Several are summed."""

    samples: int = 1
    """Answers of each model to each prompt."""

    greedy: bool = False
    """Decode greedily, with the most probable token each time, instead of sampling."""

    kl: bool | None = None
    """Estimate the KL divergence from the other model. When not set: only if both have the same vocabulary."""

    json: str | None = None
    """File to write the figures to."""

    output: str | None = None
    """File to write prompts, answers, scores and preferences to, as jsonl with one pair of answers a line. It is also
    written before scoring, so that it has the answers if scoring fails."""


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
"""Names of an evaluation's options in other tools, and the names of the same options here."""

FROM_THE_RUN = (
    *("model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name", "eval_limit", "output_dir"),
    *("reward_funcs", "reward_model_path", "eval_reward_funcs", "eval_reward_model_path"),
    *("eval_judge", "eval_judge_kwargs", "model_revision"),
)
"""Fields that an evaluation reads only from the run file; on the command line, its own options replace them."""
