"""A language model that can only answer A or B, behind vLLM's own server."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from support.vllm_tools import Launched

MAX_LENGTH = 2048
NAME = "judge"
EOS = "<eos>"
SHARPNESS = 8.0  # of attention: a few tokens decide
LEAN = 0.8  # towards A, so that both letters are said


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([EOS, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def model() -> PreTrainedModel:
    """Random weights, but for one direction that all tokens have in common: the head hears it loudest, and takes it for
    A or B.
    """
    torch.manual_seed(5)
    letters = tokenizer()
    config = Qwen2Config(
        vocab_size=len(letters),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        eos_token_id=letters.eos_token_id,
        bos_token_id=None,
    )
    made = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
        for layer in made.model.layers:
            layer.self_attn.k_proj.weight.mul_(SHARPNESS)
            layer.self_attn.o_proj.weight[0] = 0.0  # none writes into that direction
            layer.mlp.down_proj.weight[0] = 0.0
        made.model.embed_tokens.weight[:, 0] = 3.0
        made.model.norm.weight[0] = 40.0
        made.lm_head.weight[:, 0] = 0.0
        for letter, loudness in (("A", 1.0 + LEAN), ("B", 1.0)):
            row = made.lm_head.weight[letters.convert_tokens_to_ids(letter)]
            row.mul_(4.0)
            row[0] = loudness
    return made.eval()


class JudgeServer(Launched):
    """vLLM's server as its users start it, not ours."""

    def __init__(self, folder: Path) -> None:
        model().save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        super().__init__(folder)

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
        return ["vllm.entrypoints.openai.api_server", "--model", str(self.model), *options]
