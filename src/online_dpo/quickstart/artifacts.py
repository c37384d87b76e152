"""Makes everything that the quickstart starts from: tokenizer, policy, reward model and prompt files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from online_dpo.quickstart.comparisons import sample_comparisons
from online_dpo.quickstart.language import Request, prompt_of, sample_reply, sample_requests
from online_dpo.quickstart.models import (
    FULL,
    QuickstartArtifacts,
    QuickstartSize,
    build_policy_config,
    build_reward_config,
    build_tokenizer,
    new_policy,
    new_reward_model,
    train_policy,
    train_reward_model,
)


def build(output_dir: Path, seed: int = 0, size: QuickstartSize = FULL) -> QuickstartArtifacts:
    """Makes the models and prompts and saves them under ``output_dir``.

    The policy first learns the facts as they are believed, some wrongly, and then replies of mixed quality, so that it
    is fluent but mediocre; the reward model starts from the policy's body and learns from comparisons that follow the
    rubric, with noise. The five uses (fine-tuning, reward model, online prompts, validation, test) share no request.
    """
    rng = random.Random(seed)
    taught = sample_requests(size.sft_examples, seed, "sft")
    mixed = [(prompt_of(request), sample_reply(request, rng)) for request in taught]
    plain = [(prompt_of(request), sample_reply(request, rng, "plain")) for request in taught[: size.fact_examples]]
    tokenizer = build_tokenizer((f"{prompt} {reply}" for prompt, reply in mixed), size.vocab_size)

    policy = new_policy(build_policy_config(tokenizer, size.hidden, size.layers, size.heads), seed)
    train_policy(policy, tokenizer, plain, size.fact_epochs, size.batch_size, seed=seed)
    train_policy(policy, tokenizer, mixed, 1, size.batch_size, seed=seed)
    reward_model = new_reward_model(build_reward_config(tokenizer, size.hidden, size.layers, size.heads), policy, seed)
    comparisons = sample_comparisons(sample_requests(size.comparisons, seed, "reward"), seed)
    train_reward_model(reward_model, tokenizer, comparisons, seed=seed)

    made = QuickstartArtifacts(
        policy_dir=output_dir / "policy",
        reward_dir=output_dir / "reward_model",
        prompts_train=output_dir / "prompts_train.jsonl",
        prompts_validation=output_dir / "prompts_validation.jsonl",
        prompts_test=output_dir / "prompts_test.jsonl",
    )
    for model, folder in ((policy, made.policy_dir), (reward_model, made.reward_dir)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_prompts(made.prompts_train, sample_requests(size.prompts_train, seed, "online"))
    write_prompts(made.prompts_validation, sample_requests(size.prompts_validation, seed, "validation"))
    write_prompts(made.prompts_test, sample_requests(size.prompts_test, seed, "test"))
    return made


def write_prompts(file: Path, requests: Sequence[Request]) -> None:
    """One JSON object a line: ``{"prompt": "User: What is 3 plus 2?\\nAssistant:", "answer": "5", "kind": "sum"}``."""
    rows = ({"prompt": prompt_of(r), "answer": r.answer, "kind": r.kind} for r in requests)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
