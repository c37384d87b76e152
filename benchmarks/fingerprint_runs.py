"""What `fingerprints.py` trains: tiny models, prompts, rewards and judges, all made from a seed; the runs by name."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, set_seed

WORDS = [f"w{i}" for i in range(27)] + ["abcdef"]  # the word that `stop_strings` probes tokenizers with
SPECIAL = ["<pad>", "<eos>", "<unk>"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w0 {% endif %}"


def short_words(completions: list[Any], **_: Any) -> list[float]:
    """Has both ties and differences."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum(len(word) == 2 for word in text.split())) for text in texts]


def variety(completions: list[str], bonus: list[float], log_metric: Any, **_: Any) -> list[float]:
    log_metric("variety/called", 1.0)
    return [len(set(text.split())) + extra for text, extra in zip(completions, bonus, strict=True)]


async def few_short_words(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Falls as the score that is trained on rises."""
    return [-score - 0.01 * len(ids) for score, ids in zip(short_words(completions), completion_ids, strict=True)]


def more_short_words(prompt: str, first: str, second: str) -> float | None:
    ours, theirs = short_words([first, second])
    return None if ours == theirs == 0 else 0.5 + 0.4 * ((ours > theirs) - (ours < theirs))


class TRLJudge:
    """Says -1, no answer, to pairs that it cannot tell apart."""

    def judge(self, prompts: list[str], completion_pairs: list[list[str]], shuffle_order: bool = True) -> list[int]:
        counts = [short_words(pair) for pair in completion_pairs]
        return [-1 if first == second else int(second > first) for first, second in counts]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **names)


def make_model(kind: Any, seed: int, **options: Any) -> Any:
    """Random weights, large enough that next-token distributions are far from uniform."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=len(SPECIAL + WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    set_seed(seed)
    return kind(LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **shape, **tokens, **options))


def make_prompts(count: int, seed: int, chat: bool = False) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=draw).tolist()
    texts = [" ".join(WORDS[i] for i in torch.randint(27, (n,), generator=draw).tolist()) for n in lengths]
    prompts = [[{"role": "user", "content": text}] if chat else text for text in texts]
    return Dataset.from_dict({"prompt": prompts, "bonus": [float(n % 3) for n in lengths]})


def runs(seed: int) -> dict[str, dict[str, Any]]:
    """By name, in what a run differs from the plain one: fields of the configuration and arguments of the trainer."""
    reward_model = make_model(LlamaForSequenceClassification, seed + 100, num_labels=1)
    three_rewards = dict(
        reward_funcs=[short_words, variety, reward_model],
        reward_processing_classes=[None, None, make_tokenizer()],
        reward_weights=[1.0, 0.5, 2.0],
        reward_normalization=["none", "group", "group"],
    )
    return {
        "plain": {},
        "judge": dict(reward_funcs=None, judge=more_short_words, length_penalty=0.05, missing_eos_penalty=0.5),
        "trl_judge": dict(judge=TRLJudge(), judge_top=3, loss_type="ipo"),
        "rewards": dict(**three_rewards, length_penalty=0.02, missing_eos_penalty=0.3, beta=[0.1, 0.3]),
        "xpo": dict(method="xpo", num_completions=2, xpo_alpha=[0.05, 0.01], tie_policy="first"),
        "nash_md": dict(method="nash_md", num_completions=2, mixture_coef=[0.25], temperature=1.0),
        "stale": dict(max_staleness=1, use_weighting=True),
        "stale_judge": dict(reward_funcs=None, judge=more_short_words, max_staleness=2, beta=[0.2, 0.1]),
        "lora": dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), label_smoothing=0.1),
        "resampling": dict(resample_rounds=2, min_margin=1.5, max_length_ratio=2.0),
        "synced_reference": dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.4),
        "simpo": dict(loss_type=["simpo", "sft"], loss_weights=[1.0, 0.1], beta=2.0, reference_free=True),
        "adaptive_beta": dict(target_kl=0.5, beta_gain=1.0, loss_type="robust", label_smoothing=0.2),
        "gold": dict(
            eval_reward_funcs=few_short_words, overoptimisation="stop", eval_on_start=True, learning_rate=0.02
        ),
        "gold_judge": dict(eval_judge=more_short_words, overoptimisation="warn", eval_on_start=True, loss_type="hinge"),
        "passes": dict(max_tokens_per_pass=48, pair_selection="all_pairs", loss_type="dpop"),
        "stream": dict(train_dataset=make_prompts(20, seed).to_iterable_dataset(), loss_type="apo_zero"),
        "best_random": dict(pair_selection="best_random", label_temperature=1.0, share_prompts=False, max_length=18),
        "all_pairs": dict(pair_selection="all_pairs", margin_weighting=True, loss_type="exo_pair", label_smoothing=0.1),
        "two_sigma": dict(pair_selection="best_mean_minus_two_sigma", max_grad_norm=0.5, loss_type="apo_down"),
        "checkpointed": dict(gradient_checkpointing=True),
        "generate": dict(generation_kwargs={"no_repeat_ngram_size": 2, "stop_strings": ["w3"]}, top_k=12),
        "chat": dict(train_dataset=make_prompts(20, seed, chat=True), pair_selection="widest_allowed", top_p=0.9),
    }
