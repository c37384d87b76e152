"""Fields of a run file that are no training arguments: which models, which scorer, which data.

Names are those of TRL's scripts. ``schema.py`` reads this file's text, so each field is documented once, beneath it.
Nothing heavy may be imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

COUNTS = ("dataset_limit", "eval_limit", "lora_r", "lora_alpha")
"""Fields that are 1 or more."""
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``online-dpo train`` needs beside :class:`online_dpo.OnlineDPOConfig`."""

    # --- models -------------------------------------------------------------------------------------------------------

    model_name_or_path: str
    """Folder or hub name of the policy to train."""

    ref_model_name_or_path: str | None = None
    """Folder or hub name of the reference model; when not set, the policy as it was before training."""

    dtype: DType | None = None
    """Type of the policy's weights as they are loaded. When not set, see `model_init_kwargs`; to compute in bfloat16
    with weights in float32, set `bf16` instead."""

    attn_implementation: str | None = None
    """How attention is computed, such as `sdpa`, `eager` or `flash_attention_2`; when not set, transformers decides."""

    model_revision: str | None = None
    """Branch, tag or commit of the policy on the hub; when not set, `main`."""

    load_in_4bit: bool = False
    """Load the policy's weights in 4 bits and train an adapter over them (QLoRA). Needs `use_peft` and bitsandbytes."""

    load_in_8bit: bool = False
    """Load the policy's weights in 8 bits and train an adapter over them. Needs `use_peft` and bitsandbytes."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """With `load_in_4bit`: the kind of 4-bit numbers."""

    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """With `load_in_4bit`: what products are computed in. When not set, `dtype`, or else bfloat16."""

    use_bnb_nested_quant: bool = False
    """With `load_in_4bit`: quantise the scales of the weights as well."""

    bnb_4bit_quant_storage: str | None = None
    """With `load_in_4bit`: the type that the packed weights are stored in; when not set, uint8."""

    # --- scoring ----------------------------------------------------------------------------------------------------

    reward_funcs: list[str] | None = None
    """Reward functions, each as `file.py:function` or `package.module:function`, or by the name that a plugin
    registers. A file is looked for in the run file's folder first, then in the working folder."""

    judge: str | None = None
    """A judge that compares two completions: `llm` (a language model behind an endpoint), `human` (people, who vote in
    `online-dpo dashboard` while the run waits, see `human_timeout`), the folder of a pairwise model (PairRM, a sequence
    classifier, a language model that answers with a letter), or your own as `file.py:name` or `package.module:name`, or
    by the name that a plugin registers: a function `f(prompt, first, second)` that gives the probability that the first
    is better, or an object. A class is called without arguments."""

    judge_kwargs: dict[str, Any] | None = None
    """Settings of `judge: llm`, such as `{model: gpt-4.1-mini, rubric_file: rubric.txt, max_cost: 5}` (all of them:
    `online-dpo judge --help`), or of a pairwise model `batch_size` and, by its kind, `template`, `letters` or
    `max_tokens`. Files are looked for as those of `reward_funcs`."""

    # --- gold ---------------------------------------------------------------------------------------------------------

    eval_reward_funcs: list[str] | None = None
    """Gold: functions in the form of `reward_funcs` whose sum evaluations report as `eval_gold_score` beside the
    training score. Training never sees them."""

    eval_judge: str | None = None
    """Gold, in the form of `judge`: evaluations report `eval_gold_win_rate` against the reference. Not beside
    `eval_reward_funcs` and `eval_reward_model_path`."""

    eval_judge_kwargs: dict[str, Any] | None = None
    """Settings of `eval_judge`, as `judge_kwargs`."""

    # --- data -------------------------------------------------------------------------------------------------------

    dataset_name: str
    """Prompts: a hub name, or a local json, jsonl, csv, tsv (each also with .gz) or parquet file, a pattern such as
    `data/*.jsonl`, or a folder."""

    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""

    dataset_types: dict[str, str] | None = None
    """Types of columns of csv files, such as `{year: int64, score: float64, right: bool}`. All others are text."""

    dataset_train_split: str = "train"
    """Split to train on."""

    dataset_test_split: str | None = None
    """Split to evaluate on. When not set, there is no evaluation unless `eval_dataset_name` is given; its
    `train` split is then taken."""

    eval_dataset_name: str | None = None
    """Prompts to evaluate on, where they are not a split of `dataset_name`."""

    dataset_streaming: bool = False
    """Read the training prompts while training, instead of loading them first. Needs `max_steps`."""

    dataset_limit: int | None = None
    """Train on this many rows at most."""

    eval_limit: int | None = None
    """Evaluate on this many rows at most."""

    # --- plugins ----------------------------------------------------------------------------------------------------

    plugins: list[str] | None = None
    """Files (`my_loss.py`) or modules (`package.module`) that are imported before the run is built. What they register
    can be named by `loss_type`, `pair_selection`, `method`, `engine`, `reward_funcs`, `judge` and their gold
    counterparts; a metric is recorded. Files are looked for as those of `reward_funcs`."""

    # --- adapters ---------------------------------------------------------------------------------------------------

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights. Needs the `peft` extra."""

    lora_r: int = 16
    """Rank of the adapter."""

    lora_alpha: int = 32
    """Scale of the adapter."""

    lora_dropout: float = 0.0
    """Dropout of the adapter."""

    lora_target_modules: list[str] | None = None
    """Modules that get an adapter, such as `[q_proj, v_proj]`, or `all-linear`; when not set, peft picks them by model
    family."""

    lora_target_parameters: list[str] | None = None
    """Parameters that get an adapter, for weights that are no modules (the experts of some mixtures)."""

    lora_modules_to_save: list[str] | None = None
    """Modules that are trained in full beside the adapter, such as `[lm_head]`."""

    use_rslora: bool = False
    """Scale the adapter by `lora_alpha / sqrt(lora_r)`, not by `lora_alpha / lora_r`."""

    use_dora: bool = False
    """Decompose weights into magnitude and direction (DoRA)."""

    # --- ray --------------------------------------------------------------------------------------------------------

    ray: dict[str, Any] | None = None
    """How `online-dpo ray` starts the run on a cluster, such as `{train_gpus: 8, servers: 2}`; other commands ignore
    it. Its settings are listed below; on the command line they are `--ray.servers 2`."""
