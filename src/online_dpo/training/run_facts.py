"""Facts about models, data and scorers of a run that its checkpoints hold, so that another run can be told from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.fingerprint import data_fingerprint, tokenizer_fingerprint
from online_dpo.data.stream import EndlessStream
from online_dpo.foreign import callable_name
from online_dpo.modeling.fingerprint import weights_fingerprint
from online_dpo.modeling.reference import Reference
from online_dpo.scoring.protocols import Identified, PairwiseScorer, PointwiseScorer

OF_ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "modules_to_save")
OF_ADAPTER += ("bias", "use_rslora", "use_dora", "layers_to_transform", "rank_pattern", "alpha_pattern")
"""What is compared of an adapter's configuration; the rest is about loading, or has come with a version of peft."""


def model_facts(
    policy: nn.Module, peft_config: Any, ref_model: Any, reference: Reference, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Returns what is known of the models before anything is trained.

    Args:
        peft_config: that of an adapter which was made for this run, whose first weights are random.
        ref_model: what was given as the reference.
    """
    if ref_model is None:
        of_reference = "made of the policy"
    else:
        with reference.active() as model:
            of_reference = weights_fingerprint(model)
    return {
        "model": weights_fingerprint(policy, frozen_only=peft_config is not None),
        "peft_config": None if peft_config is None else _adapter(peft_config),
        "ref_model": of_reference,
        "processing_class": tokenizer_fingerprint(tokenizer),
    }


def feedback_facts(
    scorers: Sequence[PointwiseScorer], judge: PairwiseScorer | None, train_dataset: Any, args: OnlineDPOConfig
) -> dict[str, Any]:
    """Returns what is known of the scorers, of the judge, and of the prompts, which are read when it is needed."""
    workers = args.dataloader_num_workers if isinstance(train_dataset, EndlessStream) else 0
    return {
        "reward_funcs": [_scorer(scorer) for scorer in scorers],
        "judge": None if judge is None else _scorer(judge),
        "train_dataset": partial(data_fingerprint, train_dataset),
        "workers_of_stream": workers,  # each numbers the rows that it reads
    }


def users_parts(data_collator: Any, optimizers: tuple[Any, Any]) -> dict[str, Any]:
    """Returns the names of the user's own parts of a trainer."""
    return {
        "data_collator": None if data_collator is None else callable_name(data_collator),
        "optimizers": [None if part is None else type(part).__name__ for part in optimizers],
    }


def _scorer(scorer: PointwiseScorer | PairwiseScorer) -> Any:
    """The name of a scorer or judge; of one of this package, what it scores with as well.

    A user's function is known by its name alone: a mistake in it that was mended is a reason to resume.
    """
    return {scorer.name: dict(scorer.identity())} if isinstance(scorer, Identified) else scorer.name


def _adapter(peft_config: Any) -> dict[str, Any]:
    options = {name: value for name, value in peft_config.to_dict().items() if name in OF_ADAPTER}
    return json.loads(
        json.dumps(options, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
