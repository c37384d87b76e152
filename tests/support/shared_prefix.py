"""Reward models, texts that share their beginning, and the score of one text by itself."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3TextConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Completion, Group, Prompt
from support import tiny

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "<assistant>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *string.ascii_lowercase, *string.digits, "xy", "xyz"])}
BOS, EOS, PAD = 1, 2, 3
TEMPLATE = "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
ROOM = 128
LOGGER = "online_dpo.scoring.rewards.shared_prefix"


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Letters are tokens, but ``xy`` and ``xyz`` are one token each; BOS stands before every text."""
    backend = Tokenizer(models.BPE(VOCABULARY, [("x", "y"), ("xy", "z")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<user>", "<assistant>"], chat_template=TEMPLATE, **own
    )
    assert len(made) == len(VOCABULARY)
    return made


def reward_model(family: str = "llama", **options: Any) -> Any:
    """Random weights, scaled up so that scores are far from each other."""
    own: dict[str, Any] = {"vocab_size": len(VOCABULARY), "num_labels": 1, "pad_token_id": PAD, "eos_token_id": EOS}
    return sharpened(tiny.config(family, **(own | options)))


def sharpened(config: Any) -> Any:
    torch.manual_seed(0)
    model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
            elif "bias" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def letters(length: int, seed: int) -> str:
    picks = torch.randint(24, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(string.ascii_lowercase[i] for i in picks)  # neither y nor z, so nothing merges by chance


def group(content: Any, *answers: str, ended: bool = True) -> Group:
    reason = "stop" if ended else "length"
    return Group(Prompt(content, (98,), row=0), tuple(Completion((99,), (-1.0,), reason, 0, text) for text in answers))


def answers(count: int, seed: int) -> list[str]:
    return [letters(3 + (5 * k + seed) % 17, seed=1000 * seed + k) for k in range(count)]


def talk(length: int, seed: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": letters(length, seed)}]


def truth(model: Any, tok: Any, groups: Sequence[Group]) -> list[list[float]]:
    """Each text by itself, through the model's own forward."""
    plain = RewardModelScorer(model, tok, share_prompts=False)
    texts = iter(plain._token_ids([(group.prompt, answer) for group in groups for answer in group.completions]))
    with torch.no_grad():
        return [[model(torch.tensor([next(texts)])).logits.item() for _ in group.completions] for group in groups]


def agree(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for found_K, expected_K in zip(found, expected, strict=True):
        assert found_K == pytest.approx(expected_K, abs=tolerance, rel=tolerance)


class Seen:
    """Shapes of the rows that a model's body is given from now on: those with a mask of their own, and padded ones."""

    def __init__(self, model: Any) -> None:
        self.shared: list[tuple[int, int]] = []
        self.plain: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        if mask is not None:  # as it is for a text that a test gives to the model
            padded = torch.is_tensor(mask) and mask.dim() == 2
            (self.plain if padded else self.shared).append(tuple((args[0] if args else kwargs["input_ids"]).shape))


MIXED = [
    group(letters(40, seed=1), *answers(5, seed=1)),
    group(letters(9, seed=2), *answers(5, seed=2), ended=False),
    group(letters(70, seed=3), *answers(2, seed=3)),
    group(talk(20, seed=4), *answers(5, seed=4)),
    group(talk(55, seed=5), *answers(2, seed=5)),
    group("a", *answers(3, seed=6)),  # nothing worth sharing
    group(letters(12, seed=7), "same", "other", "same", "same"),
]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": ROOM}
OWN = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "eos_token_id": EOS, "num_labels": 1}
OTHERS = {
    "opt": OPTConfig(**OWN, **SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": PhiConfig(**OWN, **SIZES, intermediate_size=48),
    "mixtral": MixtralConfig(**OWN, **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "gemma3": Gemma3TextConfig(**OWN, **SIZES, intermediate_size=48, head_dim=8, num_key_value_heads=2),
}
