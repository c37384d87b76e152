"""Cross-encoders as judges: tiny models with random weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from online_dpo.errors import ScoringError
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.protocols import PairwiseScorer
from online_dpo.scoring.rewards.model import RewardModelScorer
from support import tiny
from support.endpoint import comparison

TEMPLATE = "{prompt} <end> {first} <end> {second}"
COMPARISONS = [
    comparison("w1 w2 w3", "w4", prompt="w5 w6"),
    comparison("w4", "w1 w2 w3", prompt="w5 w6"),
    comparison("w7", "w7", prompt="w8"),
    comparison("w9 w10 w11 w12 w13", "w14 w15 w16", prompt="w17"),
]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def encoder(labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        num_labels=labels,
        max_position_embeddings=32,
        initializer_range=0.5,
        **SIZES,
    )
    return BertForSequenceClassification(config).eval()


def decoder(labels: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        num_labels=labels,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=None,
        **SIZES,
    )
    return LlamaForSequenceClassification(config).eval()


def p_first(model, prompt, first, second) -> float:
    """Computed alone, without padding."""
    ids = tiny.tokenizer()(f"{prompt} <end> {first} <end> {second}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return float(logits[0].sigmoid() if len(logits) == 1 else logits.softmax(-1)[0])


@pytest.mark.parametrize("build", [encoder, decoder])
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("padded", [True, False])
def test_the_mean_of_both_orders(build, labels, padded):
    model, tokenizer = build(labels), tiny.tokenizer()
    if not padded:
        tokenizer.pad_token = None
    judge = PairwiseModelJudge(model, tokenizer, "house", TEMPLATE, batch_size=3)
    preferences = judge.prefer(COMPARISONS)
    orders = []
    for one in COMPARISONS:
        prompt, (a, b) = one.prompt.content, (completion.text for completion in one.completions)
        orders.append((p_first(model, prompt, a, b), p_first(model, prompt, b, a)))
    assert preferences == [pytest.approx((given + 1 - turned) / 2, abs=1e-5) for given, turned in orders]
    assert preferences[2] == 0.5 and preferences[0] + preferences[1] == pytest.approx(1.0)
    assert max(abs(given + turned - 1) for given, turned in orders) > 0.01  # the model does look at the place
    metrics = judge.metrics()
    assert metrics["judge/position_bias"] == pytest.approx(sum(map(sum, orders)) / 8)
    disagreed = sum((given - 0.5) * (turned - 0.5) > 0 for given, turned in orders)
    assert metrics["judge/disagreement_rate"] == pytest.approx(disagreed / 4)
    assert model.config.pad_token_id == build(labels).config.pad_token_id


def test_a_place_that_is_preferred_cancels():
    model = encoder(1)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.constant_(model.classifier.bias, 2.0)
    judge = PairwiseModelJudge(model, tiny.tokenizer(), template=TEMPLATE)
    assert judge.prefer(COMPARISONS) == [pytest.approx(0.5)] * 4
    assert judge.metrics()["judge/position_bias"] == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_nothing_is_cut_off():
    judge = PairwiseModelJudge(encoder(1), tiny.tokenizer(), template=TEMPLATE)
    long = comparison("w1 " * 20, "w2 " * 20, prompt="w3")
    fits = comparison("w1 " * 14, "w2 " * 15, prompt="w3")  # 32 tokens
    preferences = judge.prefer([long, fits, COMPARISONS[0]])
    assert preferences[0] is None and None not in preferences[1:]
    assert judge.metrics()["judge/too_long"] == 1
    assert judge.last_failure == f"too long for the model, which reads {judge.reader.max_tokens} tokens"


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_no_preference(bias):
    model = encoder(1)
    torch.nn.init.constant_(model.classifier.bias, bias)
    judge = PairwiseModelJudge(model, tiny.tokenizer(), template=TEMPLATE)
    assert judge.prefer(COMPARISONS[:1]) == [None] and judge.metrics()["judge/failed"] == 2


def test_half_precision_is_kept_in_a_folder(tmp_path):
    encoder(1).bfloat16().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    judge = PairwiseModelJudge.load(str(tmp_path), template=TEMPLATE)
    assert judge.model.dtype == torch.bfloat16
    full = PairwiseModelJudge(encoder(1), tiny.tokenizer(), template=TEMPLATE).prefer(COMPARISONS)
    assert judge.prefer(COMPARISONS) == [pytest.approx(p, abs=0.03) for p in full]


@pytest.mark.parametrize("kind", ["judge", "reward"])
def test_threads_take_turns(kind):
    """With `max_staleness`, several steps are scored at the same time. Heads on decoders want a token to pad with,
    which is in the config for the time of a forward pass."""
    model = decoder(1)
    made = (
        PairwiseModelJudge(model, tiny.tokenizer()) if kind == "judge" else RewardModelScorer(model, tiny.tokenizer())
    )
    ask = made.prefer if kind == "judge" else made.score
    expected, inside, most = ask(COMPARISONS), 0, 0

    def enter(*_):
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        time.sleep(0.05)

    def leave(*_):
        nonlocal inside
        inside -= 1

    model.model.register_forward_pre_hook(enter)
    model.model.register_forward_hook(leave)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, [COMPARISONS] * 3)) == [expected] * 3
    assert most == 1 and model.config.pad_token_id is None


def test_loaded_from_a_folder_and_in_trls_form(tmp_path):
    model = encoder(2)
    model.save_pretrained(tmp_path / "house")
    tiny.tokenizer().save_pretrained(tmp_path / "house")
    loaded = PairwiseModelJudge.load(str(tmp_path / "house"), template=TEMPLATE)
    assert loaded.name == "house" and isinstance(loaded, PairwiseScorer)
    direct = PairwiseModelJudge(model, tiny.tokenizer(), template=TEMPLATE).prefer(COMPARISONS)
    assert loaded.prefer(COMPARISONS) == [pytest.approx(p, abs=1e-6) for p in direct]
    prompts = [one.prompt.content for one in COMPARISONS]
    ranks = loaded.judge(prompts, [[c.text for c in one.completions] for one in COMPARISONS])
    assert ranks == [-1 if p == 0.5 else int(p < 0.5) for p in loaded.prefer(COMPARISONS)] and ranks[2] == -1


def test_wrong_models_and_templates(tmp_path):
    with pytest.raises(ValueError, match="one or two labels; this one has 3"):
        PairwiseModelJudge(encoder(3), tiny.tokenizer())
    with pytest.raises(ValueError, match="no place for {second}"):
        PairwiseModelJudge(encoder(1), tiny.tokenizer(), template="{prompt} {first}")
    model = encoder(2)
    model.classifier = torch.nn.Linear(32, 4)
    with pytest.raises(ScoringError, match=r"logits of shape \(2, 4\) for 2 texts; .* \(2, 2\)"):
        PairwiseModelJudge(model, tiny.tokenizer(), template=TEMPLATE).prefer(COMPARISONS[:1])
    encoder(2).bert.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained pairwise model: it has no weights for .*classifier.bias"):
        PairwiseModelJudge.load(str(tmp_path))


@pytest.mark.parametrize("make", [encoder, decoder])
def test_where_memory_runs_out_the_batch_is_halved_and_the_preferences_stay(make):
    options = dict(template=TEMPLATE, name="j")
    expected = PairwiseModelJudge(make(1), tiny.tokenizer(), **options).prefer(COMPARISONS)
    model, sizes = make(1), []

    def room(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(kwargs["input_ids"].shape[0])

    model.register_forward_pre_hook(room, with_kwargs=True)
    judge = PairwiseModelJudge(model, tiny.tokenizer(), **options)
    assert judge.prefer(COMPARISONS) == pytest.approx(expected, abs=1e-6)
    assert max(sizes) <= 2
