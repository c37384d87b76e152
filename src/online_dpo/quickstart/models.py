"""The models of the quickstart, trained from scratch on a CPU: a tokenizer, a policy that is fluent but mediocre, and a
reward model that learns the hidden rubric from noisy preferences.

The plain-text prompt ``"User: ...\\nAssistant:"`` and the chat template give the same tokens, so the models work with
plain and with conversational prompts. A text to score is ``prompt + " " + reply``, with the end token if the reply
ended by itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from online_dpo.quickstart.comparisons import Comparison, Reply
from online_dpo.quickstart.language import Request, prompt_of, right_and_wrong

Item = TypeVar("Item")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] | trim + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] | trim }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
"""Renders one user message to exactly what :func:`~online_dpo.quickstart.language.prompt_of` gives."""

PAD_ID, EOS_ID = 0, 1
"""Ids of ``<pad>`` and ``<eos>`` in every tokenizer of :func:`build_tokenizer`."""

IGNORED = -100
"""Label of tokens that are not part of the loss."""


@dataclass(frozen=True)
class QuickstartSize:
    """The size of the models and of their training data. ``fact_examples`` must not exceed ``sft_examples``."""

    hidden: int = 168
    layers: int = 2
    heads: int = 4
    vocab_size: int = 768
    fact_examples: int = 4000
    fact_epochs: int = 2
    sft_examples: int = 5000
    comparisons: int = 5000
    batch_size: int = 16
    prompts_train: int = 2000
    prompts_validation: int = 300
    prompts_test: int = 500


FULL = QuickstartSize()
TINY = QuickstartSize(
    hidden=32,
    heads=2,
    fact_examples=400,
    fact_epochs=1,
    sft_examples=600,
    comparisons=300,
    prompts_train=64,
    prompts_validation=16,
    prompts_test=16,
)
"""The size for tests and benchmarks: the same files in a few seconds, with models that have learned almost nothing."""


@dataclass(frozen=True)
class QuickstartArtifacts:
    """The paths of the saved models and prompt files.

    A row of a prompt file is ``{"prompt": "User: ...", "answer": "5", "kind": "sum"}``.
    """

    policy_dir: Path
    reward_dir: Path
    prompts_train: Path
    prompts_validation: Path
    prompts_test: Path


# --- tokenizer and configurations ------------------------------------------------------------------------------------


def build_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts. It can encode any text without loss, and adds no special tokens.

    A leading space belongs to the word after it, so the tokens of ``prompt + " " + reply`` are those of ``prompt``
    followed by those of ``" " + reply``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def build_policy_config(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 2, heads: int = 4
) -> LlamaConfig:
    """The config of a Llama with tied embeddings, which has about a million parameters at ``FULL``."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=hidden**-0.5,  # with the usual 0.02, a model this narrow needs twice as many steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def build_reward_config(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 2, heads: int = 4
) -> LlamaConfig:
    """The config of a reward model: the policy's shape with one more layer and one output.

    The extra layer can compare the answer in a reply with the one that the policy's layers predict; without it, the
    model learned the rubric more slowly.
    """
    config = build_policy_config(tokenizer, hidden, layers + 1, heads)
    config.num_labels = 1
    return config


# --- data ------------------------------------------------------------------------------------------------------------


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, reply: Reply) -> list[int]:
    return tokenizer(f"{prompt} {reply.text}").input_ids + [EOS_ID] * reply.ended


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _batches(
    items: Sequence[Item], length: Callable[[Item], int], size: int, epochs: int, rng: random.Random
) -> Iterator[list[Item]]:
    """Shuffled batches of items of about the same length."""
    for _ in range(epochs):
        ordered = sorted(rng.sample(items, len(items)), key=length)
        starts = list(range(0, len(ordered), size))
        rng.shuffle(starts)
        for start in starts:
            yield ordered[start : start + size]


# --- training --------------------------------------------------------------------------------------------------------


def new_policy(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """Create a policy with random weights, without changing the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def new_reward_model(
    config: LlamaConfig, policy: LlamaForCausalLM | None = None, seed: int = 0
) -> LlamaForSequenceClassification:
    """Create a reward model with random weights, or with the embeddings and first layers of ``policy``.

    Starting from a fine-tuned policy (arXiv 2203.02155) avoids learning the language a second time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    if policy is not None:
        copied = model.model.load_state_dict(policy.model.state_dict(), strict=False)
        assert not copied.unexpected_keys
    return model


def train_policy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[tuple[str, str]],
    epochs: int = 1,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Fine-tune a policy in place on ``(prompt, reply)`` pairs. The loss covers the reply and its end token."""
    rows = []
    for prompt, reply in examples:
        ids = _encode(tokenizer, prompt, Reply(reply))
        prompt_length = len(tokenizer(prompt).input_ids)
        rows.append((ids, [IGNORED] * prompt_length + ids[prompt_length:]))

    def loss_of(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        # Padding is on the right, and causal attention never attends to the right: no attention mask is needed.
        ids_RT = _pad([ids for ids, _ in batch], PAD_ID)
        labels_RT = _pad([labels for _, labels in batch], IGNORED)[:, 1:]
        hidden_RTH = model.model(input_ids=ids_RT).last_hidden_state[:, :-1]
        predicted = labels_RT != IGNORED
        return F.cross_entropy(model.lm_head(hidden_RTH[predicted]), labels_RT[predicted])

    batches = list(_batches(rows, lambda row: len(row[0]), batch_size, epochs, random.Random(seed)))
    _fit(model, batches, loss_of, learning_rate)


def train_reward_model(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    comparisons: Sequence[Comparison],
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    seed: int = 0,
) -> None:
    """Train a reward model in place with the Bradley-Terry loss (arXiv 2203.02155, equation 1).

    The loss is -log sigmoid(winner's score - loser's score), averaged over all preferences of a batch. ``batch_size``
    counts comparisons. The score is read at the last token, as in ``LlamaForSequenceClassification``.
    """
    rows = [_encode_comparison(tokenizer, item) for item in comparisons]

    def loss_of(batch: list[_Encoded]) -> torch.Tensor:
        scores_S = _scores(model, batch)
        starts = accumulate((len(row.replies) for row in batch), initial=0)
        pairs_N2 = [
            [start + win, start + loss] for start, row in zip(starts, batch, strict=False) for win, loss in row.wins
        ]
        chosen_N, rejected_N = scores_S[torch.tensor(pairs_N2)].unbind(dim=1)
        return -F.logsigmoid(chosen_N - rejected_N).mean()

    batches = list(_batches(rows, _Encoded.__len__, batch_size, epochs, random.Random(seed)))
    _fit(model, batches, loss_of, learning_rate)


@torch.no_grad()
def reward_model_accuracy(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request], seed: int
) -> float:
    """Measure how often the reward model prefers the right one of two replies that differ only in correctness.

    There are two such pairs for each request. Whether the policy learns right answers depends on this share.
    """
    rng = random.Random(seed)
    is_right = []
    for request in requests:
        replies = tuple(Reply(text) for _ in range(2) for text in right_and_wrong(request, rng))
        scores_S = _scores(model, [_encode_comparison(tokenizer, Comparison(prompt_of(request), replies, ()))])
        is_right += (scores_S[::2] > scores_S[1::2]).tolist()
    return sum(is_right) / len(is_right)


@dataclass(frozen=True)
class _Encoded:
    """A comparison as token ids. Its row in a batch is the prompt, then the replies one after the other."""

    prompt: list[int]
    replies: list[list[int]]
    wins: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.replies))


def _encode_comparison(tokenizer: PreTrainedTokenizerFast, item: Comparison) -> _Encoded:
    prompt = tokenizer(item.prompt).input_ids
    replies = [_encode(tokenizer, item.prompt, reply)[len(prompt) :] for reply in item.replies]
    return _Encoded(prompt, replies, item.wins)


def _scores(model: LlamaForSequenceClassification, batch: Sequence[_Encoded]) -> torch.Tensor:
    """The model's scores of all replies, in order. A prompt is computed once; a reply attends to it and to itself.

    This takes two fifths less time than one row for each reply.
    """
    ids, part, position, last = [], [], [], []
    for number, row in enumerate(batch):
        ids.append([*row.prompt, *chain(*row.replies)])
        part.append([0] * len(row.prompt))  # 0 the prompt, 1 the first reply, ...; -1 padding
        position.append([*range(len(row.prompt))])
        for branch, reply in enumerate(row.replies, start=1):
            part[-1] += [branch] * len(reply)
            position[-1] += range(len(row.prompt), len(row.prompt) + len(reply))
            last.append((number, len(part[-1]) - 1))
    part_RT = _pad(part, -1)
    mask_RTT = ((part_RT[:, :, None] == part_RT[:, None, :]) | (part_RT == 0)[:, None, :]).tril()
    hidden_RTH = model.model(
        input_ids=_pad(ids, PAD_ID), attention_mask=mask_RTT[:, None], position_ids=_pad(position, 0)
    ).last_hidden_state
    row_S, last_S = torch.tensor(last).unbind(dim=1)
    return model.score(hidden_RTH[row_S, last_S])[:, 0]


def _fit(model: PreTrainedModel, batches: Sequence[list], loss_of: Callable[[list], torch.Tensor], peak: float) -> None:
    """Train with AdamW on all batches: a short warm-up, then cosine decay to a twentieth of the peak learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, len(batches) // 20)
    model.train()
    for step, batch in enumerate(batches):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warmup) * decay
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
