"""What the benchmarks train on: model shapes, prompts and completion lengths, all made from seeds.

How long completions are decides how fast a step is, and a policy with random weights does not end by itself. So the
lengths are given: `Workload.lengths[row][sample]`. Both trainers sample as they always do, and only the token at which
a completion ends is forced (see `forced.py`). Every prompt ends with a token of its own, by which its lengths are found
wherever the prompt turns up.

Nothing here imports torch at the top, so that wrong arguments are refused at once.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = 0, 1, 2
SPECIAL = ("<pad>", "<eos>", "<unk>")
PROMPTS_PER_STEP = 8
MOST_STEPS = 50
MOST_PROMPTS = PROMPTS_PER_STEP * MOST_STEPS
FIRST_RESERVED = len(SPECIAL)
FIRST_WORD = FIRST_RESERVED + MOST_PROMPTS
"""Ids from `FIRST_RESERVED` on belong to one prompt each; all other prompt tokens are drawn from `FIRST_WORD` on."""
MOST_COMPLETIONS = 8
SEED = 20240207


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model with tied embeddings. ``kv_heads`` key-value heads serve ``heads`` query heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    positions: int = 32768

    @property
    def kv_width(self) -> int:
        """Numbers in the keys (or values) of one token and layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that are multiplied with every token: query, key, value, output; gate, up, down."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return attention + 3 * self.hidden * self.intermediate


MODELS = {
    "tiny": Shape(64, 2, 4, 2, 128, 1000),
    "small": Shape(512, 8, 8, 2, 1408, 32000),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
}


@dataclass(frozen=True)
class Kind:
    """A workload before it is drawn. Lengths are in tokens; ``completions`` is K of our trainer (TRL has always 2)."""

    shortest_prompt: int
    longest_prompt: int
    max_new_tokens: int
    completions: int = 2
    as_measured: bool = False


KINDS = {
    "chat": Kind(64, 128, 64, as_measured=True),
    "long-prompt": Kind(512, 512, 128),
    "long-answer": Kind(128, 128, 512),
    "k8": Kind(64, 128, 64, completions=8, as_measured=True),
}


@dataclass(frozen=True)
class Workload:
    """Prompts and the completion lengths that belong to them.

    ``prompts[row]`` are token ids; ``lengths[row][sample]`` counts the tokens of a completion, its end token included.
    A length of ``max_new_tokens`` says that the completion is cut there and has no end token.
    """

    name: str
    prompts: list[list[int]]
    lengths: list[list[int]]
    max_new_tokens: int
    completions: int

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion: with it as the trainers' ``max_length``, nothing is truncated."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    @staticmethod
    def row_of(last_token: int) -> int:
        """The row of the prompt that ends with this token."""
        return last_token - FIRST_RESERVED

    def texts(self) -> list[str]:
        """The prompts as text. A space ends each: trainers join prompt and completion without one."""
        return [" ".join(f"w{i}" for i in ids) + " " for ids in self.prompts]

    def dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({"prompt": self.texts()})


def make_workload(name: str, vocabulary: int, steps: int, per_step: int = PROMPTS_PER_STEP) -> Workload:
    """Prompts for this many steps. The first rows do not depend on how many there are."""
    kind, rng = KINDS[name], random.Random(SEED)
    assert steps * per_step <= MOST_PROMPTS and vocabulary > FIRST_WORD
    prompts, lengths = [], []
    for row in range(steps * per_step):
        size = rng.randint(kind.shortest_prompt, kind.longest_prompt)
        words = [rng.randrange(FIRST_WORD, vocabulary) for _ in range(size - 1)]
        prompts.append([*words, FIRST_RESERVED + row])
        lengths.append([_length(kind, rng) for _ in range(MOST_COMPLETIONS)])
    return Workload(name, prompts, lengths, kind.max_new_tokens, kind.completions)


def _length(kind: Kind, rng: random.Random) -> int:
    """A measured length, or a log-normal one around half of the maximum; about a fifth of those reach the maximum."""
    if kind.as_measured:
        return min(rng.choice(CHAT_LENGTHS), kind.max_new_tokens)
    drawn = kind.max_new_tokens / 2 * math.exp(rng.gauss(0.0, 0.82))
    return max(2, min(round(drawn), kind.max_new_tokens))


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word a token: id 17 is "w17", so text and ids turn into each other without loss."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[UNKNOWN]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=shape.positions,
    )


def _config(shape: Shape, **more: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **more,
    )


def make_policy(shape: Shape, device: str) -> PreTrainedModel:
    """A policy with random fp32 weights, the same in every process on the same device."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(SEED)
    with torch.device(device):
        return Qwen2ForCausalLM(_config(shape))


def make_reward_model(shape: Shape, device: str, dtype: str) -> PreTrainedModel:
    """A reward model of the same shape with random weights. SelfPlay trains it, so it is held in ``dtype``."""
    import torch
    from transformers import Qwen2ForSequenceClassification

    torch.manual_seed(SEED + 1)
    with torch.device(device):
        return Qwen2ForSequenceClassification(_config(shape, num_labels=1)).to(getattr(torch, dtype)).eval()


# fmt: off
CHAT_LENGTHS = (
    13, 16, 6, 5, 23, 22, 14, 9, 12, 12, 6, 31, 11, 10, 18, 9, 22, 18, 9, 21, 10, 6, 9, 27, 15, 8, 16, 14, 8, 5, 26,
    12, 14, 17, 5, 18, 19, 24, 8, 20, 6, 5, 36, 6, 11, 15, 10, 5, 11, 21, 17, 36, 23, 5, 14, 21, 12, 21, 16, 12, 10,
    21, 5, 13, 8, 14, 8, 13, 19, 6, 5, 14, 8, 64, 6, 24, 13, 8, 10, 5, 22, 7, 18, 22, 7, 8, 5, 8, 14, 40, 9, 12, 13,
    8, 11, 24, 7, 16, 24, 26, 12, 7, 35, 9, 28, 31, 11, 5, 16, 16, 11, 6, 35, 6, 12, 6, 6, 15, 13, 19, 19, 15, 7, 21,
    24, 5, 9, 6, 32, 25, 25, 8, 31, 5, 18, 16, 24, 7, 24, 7, 5, 7, 25, 14, 7, 7, 12, 14, 20, 8, 14, 19, 18, 9, 16, 14,
    18, 26, 9, 15, 15, 24, 10, 12, 6, 8, 6, 5, 24, 22, 20, 12, 18, 6, 6, 10, 19, 14, 26, 9, 7, 10, 17, 12, 8, 13, 24,
    12, 16, 6, 25, 41, 17, 10, 11, 7, 6, 14, 14, 10, 10, 7, 15, 11, 11, 17, 9, 32, 12, 20, 24, 22, 14, 7, 16, 13, 8,
    26, 11, 5, 22, 16, 2, 10, 2, 23, 29, 18, 30, 27, 15, 10, 10, 14, 8, 12, 11, 9, 19, 6, 26, 19, 21, 20, 23, 13, 9,
    17, 11, 17, 7, 13, 11, 21, 20, 7, 14, 23, 20, 17, 10, 10, 35, 18, 7, 6, 18, 48, 11, 20, 16, 7, 20, 10, 17, 10, 15,
    27, 13, 23, 15, 28, 10, 24, 12, 23, 19, 5, 11, 41, 12, 18, 12, 6, 19, 7, 11, 10, 10, 2, 5, 6, 14, 12, 9, 12, 11,
    7, 19, 19, 13, 18, 31, 24, 11, 21, 5, 20, 5, 20,
)
# fmt: on
"""Tokens of completions (end token included) that a real policy wrote: the quickstart's, before online training, at
temperature 1, one for each of its first 320 training prompts, cut at 64. They are short (mean 15) and of every length,
which is what makes padding and rows that have ended expensive."""
