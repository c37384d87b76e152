"""Makes a pairwise judge of the quickstart's language: a cross-encoder that reads a request with two answers.

    python recipes/judges/quickstart.py runs/quickstart/start

It starts as the quickstart's reward model, learns from comparisons that follow the rubric, with noise, and is saved as
`judge` in that folder. How its texts are written is part of what it learned, so a run file says it too:

    judge: runs/quickstart/start/judge
    judge_kwargs: {template: "{prompt} {first}<eos>{prompt} {second}<eos>"}
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from online_dpo.quickstart.comparisons import Comparison, sample_comparisons
from online_dpo.quickstart.language import sample_requests
from online_dpo.quickstart.models import FULL

TEMPLATE = "{prompt} {first}<eos>{prompt} {second}<eos>"

Example = tuple[list[int], float]
"""Tokens, and 1 where the first answer is the better one, else 0."""


def main() -> None:
    """Makes the judge that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the quickstart made its models: runs/quickstart/start")
    parser.add_argument("--comparisons", type=int, default=FULL.comparisons, help="requests to learn from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.folder / "reward_model").is_dir():
        parser.error(f"{arguments.folder} holds no reward_model; `online-dpo quickstart` makes one.")
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "reward_model")
    model = deeper(AutoModelForSequenceClassification.from_pretrained(arguments.folder / "reward_model"))
    comparisons = sample_comparisons(sample_requests(arguments.comparisons, arguments.seed, "reward"), arguments.seed)
    fit(model, list(examples(comparisons, tokenizer, random.Random(arguments.seed))), arguments.seed)
    model.save_pretrained(arguments.folder / "judge")
    tokenizer.save_pretrained(arguments.folder / "judge")
    print(f"Saved in {arguments.folder / 'judge'} after {time.perf_counter() - began:.0f} s. Template: {TEMPLATE!r}")


def deeper(reward_model: LlamaForSequenceClassification) -> LlamaForSequenceClassification:
    """The reward model with one more layer, which can compare what the others find at the ends of the two answers."""
    config = copy.deepcopy(reward_model.config)
    config.num_hidden_layers += 1
    model = LlamaForSequenceClassification(config)
    model.load_state_dict(reward_model.state_dict(), strict=False)
    return model


def examples(
    comparisons: list[Comparison], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[Example]:
    """A few preferences of each comparison, in either order."""
    for item in comparisons:
        for win, loss in rng.sample(item.wins, min(len(item.wins), 2)):
            places = [win, loss]
            rng.shuffle(places)
            first, second = (item.replies[place].text for place in places)
            text = TEMPLATE.format(prompt=item.prompt, first=first, second=second)
            yield tokenizer(text).input_ids, float(places[0] == win)


def fit(model, rows: list[Example], seed: int, batch_size: int = 32, learning_rate: float = 1e-3) -> None:
    """One epoch of binary cross-entropy on the logit at the last token."""
    rng = random.Random(seed)
    rows = sorted(rows, key=lambda row: len(row[0]))  # a batch has texts of about one length
    starts = list(range(0, len(rows), batch_size))
    rng.shuffle(starts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(starts), pct_start=0.1)
    model.train()
    losses = []
    for step, start in enumerate(starts):
        ids, labels = zip(*rows[start : start + batch_size], strict=True)
        width = max(map(len, ids))
        ids_RT = torch.tensor([[*row, *[model.config.pad_token_id] * (width - len(row))] for row in ids])
        mask_RT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        logits_R = model(input_ids=ids_RT, attention_mask=mask_RT).logits[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits_R, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"batch {step + 1}/{len(starts)}  loss {sum(losses[-50:]) / 50:.4f}", flush=True)


if __name__ == "__main__":
    main()
