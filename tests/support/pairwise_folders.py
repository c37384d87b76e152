"""Folders of tiny pairwise models in the published forms, written without the package's own classes, and what each
says of a comparison, computed alone and without padding from the published definition.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

from support import tiny

MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
HIDDEN = 32


def pairrm_tokenizer() -> DebertaV2Tokenizer:
    """As of deberta-v3, with the policy's words as its pieces, and the marks added as PairRM's makers did."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789:!?."]
    pieces = [(piece, 0.0) for piece in specials] + [(f"▁{word}", -1.0) for word in tiny.WORDS]
    pieces += [("▁", -2.0)] + [(letter, -5.0) for letter in letters]
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=3)
    tokenizer.add_tokens(MARKS)
    return tokenizer


def pairrm_weights(config: DebertaV2Config, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weights = {f"pretrained_model.{name}": w for name, w in DebertaV2Model(config).state_dict().items()}
    for layer, shape in ((1, (HIDDEN, 2 * HIDDEN)), (4, (config.n_tasks, HIDDEN))):
        weights[f"head_layer.{layer}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        weights[f"head_layer.{layer}.bias"] = torch.randn(shape[0])
    return weights


def pairrm_folder(folder: Path, dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
    tokenizer = pairrm_tokenizer()
    fields = dict(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,  # says only how far relative positions are told apart
        initializer_range=0.3,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        n_tasks=1,
        drop_out=0.05,
        pad_token_id=tokenizer.pad_token_id,
    )
    names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(MARKS), strict=True))
    config = DebertaV2Config(**{**fields, **ids, **overrides})
    config.architectures = ["DebertaV2PairRM"]
    config.dtype = dtype
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: w.to(dtype).contiguous() for name, w in pairrm_weights(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def pairrm_log_odds(folder: Path, prompt: str, first: str, second: str) -> float:
    """The published `tokenize_pair` and forward pass, for one comparison."""
    config = DebertaV2Config(**json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    encoder = DebertaV2Model(config).to(next(iter(weights.values())).dtype).eval()
    inner = "pretrained_model."
    encoder.load_state_dict({name.removeprefix(inner): w for name, w in weights.items() if name.startswith(inner)})
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    ids = [i for mark, text in zip(MARKS, (prompt, first, second), strict=False) for i in tokenizer.encode(mark + text)]
    states = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    source, one, two = (states[ids.index(tokenizer.convert_tokens_to_ids(mark))] for mark in MARKS[:3])

    def rating(state: torch.Tensor) -> torch.Tensor:
        inside = weights["head_layer.1.weight"] @ torch.cat([source, state]) + weights["head_layer.1.bias"]
        return weights["head_layer.4.weight"] @ inside.tanh() + weights["head_layer.4.bias"]

    return float((rating(one) - rating(two)).mean())
