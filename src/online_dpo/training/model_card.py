"""The model card: what was trained, from which model, with which settings, and with which results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import TrainerState

from online_dpo import __version__
from online_dpo.checkpoints.files import write_text
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.quantization import describe
from online_dpo.runs.layout import is_run_folder
from online_dpo.runs.report.card import describe_run
from online_dpo.runs.report.text import plain_text

SETTINGS = (
    *("method", "num_completions", "max_new_tokens", "max_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "reward_weights", "reward_normalization", "missing_eos_penalty", "length_penalty"),
    *("judge_top", "pair_selection", "min_margin", "max_margin", "max_length_ratio"),
    *("margin_weighting", "label_temperature", "tie_policy", "loss_type", "loss_weights", "beta", "label_smoothing"),
    *("resample_rounds", "xpo_alpha", "mixture_coef", "target_kl"),
    *("simpo_gamma", "dpop_lambda", "use_weighting", "sync_ref_model"),
    *("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs", "seed", "bf16", "fp16"),
)
RESULTS = (
    *("loss", "objective/scores", "objective/kl", "rewards/margins", "rewards/accuracies", "val/contain_eos_token"),
    *("completions/mean_length", "eval_loss", "eval_objective/scores", "eval_objective/kl", "eval_win_rate"),
    *("eval_gold_score", "eval_gold_win_rate"),
)
TEXT = """# {name}

This model was trained with Online DPO ([Guo et al. 2024](https://huggingface.co/papers/2402.04792)): completions are
sampled from the model while it trains, scored, and the better and the worse one of each prompt form the pair of a DPO
step.

| | |
|---|---|
| policy | {policy} |
| reference | {reference} |
| feedback | {feedback} |
| optimizer steps | {steps} |
| processes | {processes} |

## Last measurements

| metric | value | at step |
|---|---|---|
{results}

{course}## Settings

```json
{settings}
```

Versions: online-dpo {version}, transformers {transformers}, torch {torch}.
"""


def write_model_card(
    args: OnlineDPOConfig,
    state: TrainerState,
    policy: nn.Module,
    *,
    name: str | None,
    reference: str,
    feedback: str,
    num_processes: int,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    **metadata: Any,
) -> None:
    """Write the model card as ``README.md`` into the output folder; where the run has a record, with its course and a
    picture of it.

    Args:
        args: the configuration; `SETTINGS` are listed in the card.
        state: the trainer's state, with the log history of `RESULTS`.
        policy: the trained model.
        name: title of the card; by default the hub name or the name of the folder.
        reference: description of the reference model, in words.
        feedback: description of the rewards or the judge, in words.
        num_processes: number of processes of the run.
        tags: tags of the model, in addition to the default ones.
        base_model: hub name of the base model; by default the one that the policy was loaded from.
        metadata: more fields of `huggingface_hub.ModelCardData`.
    """
    data = _card_data(policy, tags, base_model, metadata)
    output_dir = Path(str(args.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(
        name=plain_text(name or args.hub_model_id or output_dir.name),
        policy=plain_text(_describe(policy)),
        reference=plain_text(reference),
        feedback=plain_text(feedback),
        steps=state.global_step,
        processes=num_processes,
        results="\n".join(_result_rows(state.log_history)),
        course=describe_run(output_dir) if args.run_folder and is_run_folder(output_dir) else "",
        settings=_as_json({setting: getattr(args, setting) for setting in SETTINGS}),
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    write_text(output_dir / "README.md", f"---\n{data.to_yaml()}\n---\n\n{text}")


def _as_json(settings: dict[str, Any]) -> str:
    """Settings as JSON without characters that HTML gives a meaning."""
    text = json.dumps(settings, indent=2, default=str)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("`", "\\u0060")


def _card_data(policy: nn.Module, tags: Sequence[str], base_model: str | None, more: dict[str, Any]) -> ModelCardData:
    """The head of the card, which the hub reads. It never shows a path on this machine."""
    base = unwrapped(policy)
    source = str(base.config._name_or_path)
    return ModelCardData(
        library_name="peft" if base is not policy else "transformers",
        base_model=base_model or (source if _is_hub_name(source) else None),
        tags=list(dict.fromkeys(["online-dpo", "dpo", "generated-from-trainer", *tags])),
        **{name: value for name, value in more.items() if value},
    )


def _is_hub_name(source: str) -> bool:
    """Whether a model can have been loaded from the hub by this name, and is not a folder here."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return bool(source) and not Path(source).is_dir()


def _describe(policy: nn.Module) -> str:
    """The name and the type of the policy, and how it is quantised; of a folder only its name."""
    config, quantized = unwrapped(policy).config, describe(policy)
    kind = config.model_type if quantized is None else f"{config.model_type}, {quantized}"
    return f"{Path(str(config._name_or_path)).name or 'given as an object'} ({kind})"


def as_list(value: str | list[str] | None) -> list[str]:
    """Convert one value, several or none to a list, as `transformers.Trainer.create_model_card` accepts them."""
    return [value] if isinstance(value, str) else list(value or ())


def _result_rows(log_history: list[dict[str, Any]]) -> list[str]:
    """The rows of the table of results: the last value of each metric and its step."""
    rows = []
    for name in RESULTS:
        logs = [log for log in log_history if _is_number(log.get(name)) and _is_number(log.get("step"))]
        if logs:
            rows.append(f"| `{name}` | {logs[-1][name]:.4g} | {logs[-1]['step']} |")
    return rows or ["| none yet | | |"]


def _is_number(value: Any) -> bool:
    """A log may have been read from a checkpoint of others."""
    return isinstance(value, (int, float))
