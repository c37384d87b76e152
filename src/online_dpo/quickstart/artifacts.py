"""Creates what the quickstart starts from: tokenizer, policy, reward model and prompt files."""

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
    """Train the models, sample the prompts, and save everything under ``output_dir``.

    The policy first learns all facts, some of them wrong, and then replies of mixed quality, so that it is fluent but
    mediocre. The reward model starts from the policy's layers and learns from noisy comparisons by the rubric. The five
    uses (fine-tuning, reward model, online prompts, validation, test) have no request in common.
    """
    rng = random.Random(seed)
    requests = sample_requests(size.sft_examples, seed, "sft")
    mixed = [(prompt_of(request), sample_reply(request, rng)) for request in requests]
    plain = [(prompt_of(request), sample_reply(request, rng, "plain")) for request in requests[: size.fact_examples]]
    tokenizer = build_tokenizer((f"{prompt} {reply}" for prompt, reply in mixed), size.vocab_size)

    policy = new_policy(build_policy_config(tokenizer, size.hidden, size.layers, size.heads), seed)
    train_policy(policy, tokenizer, plain, size.fact_epochs, size.batch_size, seed=seed)
    train_policy(policy, tokenizer, mixed, 1, size.batch_size, seed=seed)
    reward_model = new_reward_model(build_reward_config(tokenizer, size.hidden, size.layers, size.heads), policy, seed)
    comparisons = sample_comparisons(sample_requests(size.comparisons, seed, "reward"), seed)
    train_reward_model(reward_model, tokenizer, comparisons, seed=seed)

    artifacts = QuickstartArtifacts(
        policy_dir=output_dir / "policy",
        reward_dir=output_dir / "reward_model",
        prompts_train=output_dir / "prompts_train.jsonl",
        prompts_validation=output_dir / "prompts_validation.jsonl",
        prompts_test=output_dir / "prompts_test.jsonl",
    )
    for model, folder in ((policy, artifacts.policy_dir), (reward_model, artifacts.reward_dir)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_prompts(artifacts.prompts_train, sample_requests(size.prompts_train, seed, "online"))
    write_prompts(artifacts.prompts_validation, sample_requests(size.prompts_validation, seed, "validation"))
    write_prompts(artifacts.prompts_test, sample_requests(size.prompts_test, seed, "test"))
    return artifacts


def write_prompts(file: Path, requests: Sequence[Request]) -> None:
    """Write requests to a jsonl file.

    A line is ``{"prompt": "User: What is 3 plus 2?\\nAssistant:", "answer": "5", "kind": "sum"}``.
    """
    rows = ({"prompt": prompt_of(r), "answer": r.answer, "kind": r.kind} for r in requests)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
