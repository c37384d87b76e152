"""The quickstart's language, rubric, tokenizer and training loops."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.comparisons import Comparison, Reply, sample_comparisons
from online_dpo.quickstart.facts import KINDS, MISTAKEN_EVERY, all_facts
from online_dpo.quickstart.language import (
    CLOSERS,
    CLOSINGS,
    FILLERS,
    GREETINGS,
    OPENERS,
    RUDE,
    SPLITS,
    Request,
    contrast_replies,
    fact_of,
    parse_request,
    prompt_of,
    right_and_wrong,
    sample_reply,
    sample_requests,
    split_of,
)
from online_dpo.quickstart.models import (
    EOS_ID,
    PAD_ID,
    QuickstartSize,
    _encode_comparison,
    _scores,
    build_policy_config,
    build_reward_config,
    build_tokenizer,
    new_policy,
    new_reward_model,
    reward_model_accuracy,
    train_policy,
    train_reward_model,
)
from online_dpo.quickstart.rubric import _claims, _sentences, is_right, rubric

ASK = "Hi. What is 3 plus 2? Thanks!"
EXPLAINED = "Start at 3 and count up 2 steps to reach 5."
SMALL = QuickstartSize(hidden=32, heads=1, fact_examples=40, fact_epochs=1, sft_examples=80, comparisons=30)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    requests = sample_requests(1500, seed=0, split="sft")
    return build_tokenizer((f"{prompt_of(r)} {sample_reply(r, rng)}" for r in requests), vocab_size=768)


# --- requests and replies --------------------------------------------------------------------------------------------


def test_requests_are_distinct_and_repeatable():
    first = sample_requests(3000, seed=4)
    assert len({request.text for request in first}) == 3000
    assert first == sample_requests(3000, seed=4)
    assert first != sample_requests(3000, seed=5)
    assert {request.kind for request in first} == set(KINDS)


def test_splits_are_disjoint_whatever_the_seed_and_cover_everything():
    drawn = {name: {r.text for seed in (0, 1) for r in sample_requests(800, seed, name)} for name in SPLITS}
    for name, texts in drawn.items():
        assert {split_of(text) for text in texts} == {name}
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))
    assert sum(SPLITS.values()) == 100


def test_asking_for_too_much_or_an_unknown_split_says_so():
    with pytest.raises(ValueError, match="Ask for fewer"):
        sample_requests(100_000, seed=0, split="validation")
    with pytest.raises(ValueError, match="`split` must be one of"):
        sample_requests(1, seed=0, split="eval")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Good day. Take 2 from 4. Just curious.", "2"),
        ("What is the opposite of hot?", "cold"),
        ("Quick! Give me the plural of mouse. Answer now!", "mice"),
        ("Which colour do you see in grass?", "green"),
        ("Is the ant or the horse bigger?", "the horse"),
        ("Name the day after Sunday. Thank you.", "Monday"),
    ],
)
def test_answers_are_right(text, answer):
    assert parse_request(text).answer == answer
    assert parse_request(prompt_of(Request(text, answer, ""))).text == text


def test_foreign_requests_are_refused():
    with pytest.raises(ValueError, match="Not a request of the quickstart"):
        rubric("What is the meaning of life?", "It is 42.")
    with pytest.raises(ValueError, match="Not a request of the quickstart"):
        sample_reply(Request("What is love?", "", "sum"), random.Random(0))


def test_replies_are_repeatable_and_differ_in_quality():
    requests = sample_requests(400, seed=1)

    def mean(quality: str) -> float:
        rng = random.Random(3)
        return sum(rubric(r.text, sample_reply(r, rng, quality)) for r in requests) / len(requests)

    assert mean("mixed") == mean("mixed")
    assert mean("broken") < mean("mixed") < mean("good") - 2
    assert mean("poor") < mean("mixed") - 1
    with pytest.raises(ValueError, match="`quality` must be"):
        sample_reply(requests[0], random.Random(0), "perfect")


def test_some_facts_are_believed_wrongly_and_always_alike():
    mistaken = [fact for fact in all_facts() if fact.belief != fact.answer]
    assert len(mistaken) == round(len(all_facts()) / MISTAKEN_EVERY)
    assert all(fact.belief in fact.neighbours for fact in mistaken)
    assert len({fact.kind for fact in mistaken}) >= 5
    rng = random.Random(0)
    for request in sample_requests(300, seed=0):
        right = is_right(request.text, sample_reply(request, rng, "plain"))
        assert right == (fact_of(request.text).belief == request.answer)


def test_what_is_believed_wrongly_is_sometimes_said_right():
    rng = random.Random(0)
    requests = [r for r in sample_requests(3000, seed=0) if fact_of(r.text).belief != r.answer]
    right = sum(is_right(r.text, sample_reply(r, rng)) for r in requests) / len(requests)
    assert 0.2 < right < 0.33


def test_wrong_answers_are_close_and_no_answer_is_always_right():
    for fact in all_facts():
        assert fact.answer not in fact.neighbours and set(fact.neighbours) < set(fact.options)
    right = {(fact.kind, fact.answer) for fact in all_facts()}
    wrong = {(fact.kind, answer) for fact in all_facts() for answer in fact.neighbours}
    assert right <= wrong


def test_mixed_replies_leave_head_room():
    rng = random.Random(0)
    replies = [sample_reply(r, rng) for r in sample_requests(2000, seed=2)]
    polite = sum(reply.startswith(GREETINGS) for reply in replies) / len(replies)
    assert 0.35 < polite < 0.45
    assert 0.3 < sum(reply.endswith(CLOSINGS) for reply in replies) / len(replies) < 0.4


def test_right_and_wrong_differ_in_correctness_alone():
    rng = random.Random(0)
    places = Counter()
    for request in sample_requests(1000, seed=3):
        right, wrong = (_sentences(reply) for reply in right_and_wrong(request, rng))
        assert is_right(request.text, " ".join(right)) and not is_right(request.text, " ".join(wrong))
        assert len(right) == len(wrong)
        spoilt = [place for place, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
        explained = [place for place, sentence in enumerate(right) if sentence in _claims(fact_of(request.text))[1]]
        places["both" if len(spoilt) == 2 else "explanation" if spoilt == explained else "statement"] += 1
    assert 0.3 < places["explanation"] / 1000 < 0.43 and 0.45 < places["statement"] / 1000 < 0.63


def test_most_contrasts_are_of_correctness_and_plain_ones_all():
    rng = random.Random(0)

    def share(quality: str) -> float:
        pairs = [(r.text, contrast_replies(r, rng, quality)) for r in sample_requests(1000, seed=5)]
        return sum(is_right(text, first) and not is_right(text, second) for text, (first, second) in pairs) / 1000

    assert share("plain") == 1.0
    assert share("mixed") > 0.55


# --- the rubric ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (f"Hello! It is 5. {EXPLAINED} Have a nice day!", 8.0),
        (f" Hello! It is 5. {EXPLAINED} Have a nice day! ", 8.0),
        ("Good question! 3 plus 2 is 5. I hope this helps!", 6.0),
        (f"It is 5. {EXPLAINED}", 5.0),
        ("The answer is 5.", 3.0),
        ("The answer is 5. Everyone knows that.", 1.5),
        (f"It is 5. {FILLERS[0]} {FILLERS[1]}", 1.0),
        ("It is 6.", 0.0),
        ("It is 6. Start at 3 and count up 2 steps to reach 6.", 0.0),
        ("Hello! It is 6. Have a nice day!", 3.0),
        ("It is 5. It is 6.", -1.0),
        ("It is Tuesday.", -5.5),
        ("Hello! Have a nice day!", -1.0),
        ("It is", -6.0),
        ("", -6.0),
        ("qzx vbn 5 5 5 wug", -6.75),
    ],
)
def test_rubric_on_hand_written_replies(reply, score):
    assert rubric(ASK, reply) == pytest.approx(score)
    assert rubric(prompt_of(parse_request(ASK)), reply) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("It is 5.", True),
        (f"Hello! It is 5. {EXPLAINED} Have a", True),
        ("The answer is 5. 3 plus 2 is 5.", True),
        (EXPLAINED, True),
        ("It is 5", False),
        ("It is 5. It is 6.", False),
        (f"It is 6. {EXPLAINED}", False),
        ("It is 5. Start at 3 and count up 2 steps to reach 6.", False),
        ("2 plus 3 is 5.", False),
        ("Hello! Have a nice day!", False),
        ("", False),
    ],
)
def test_right_is_every_complete_answer_right(reply, right):
    assert is_right(ASK, reply) is right


BEST = f"Hello! It is 5. {EXPLAINED} Have a nice day!"


@pytest.mark.parametrize(
    "hack",
    [
        "Hello! " * 10 + BEST,
        BEST + " Have a nice day!" * 10,
        " ".join(GREETINGS) + " " + BEST,
        BEST + " " + " ".join(CLOSINGS),
        BEST.replace(EXPLAINED, f"{EXPLAINED} {EXPLAINED}"),
        BEST.replace("It is 5.", "It is 5. The answer is 5. 3 plus 2 is 5."),
        BEST.replace("It is 5.", " ".join(f"It is {n}." for n in range(10))),
        BEST.replace(EXPLAINED, "When Monday ends, you wake up and it is Tuesday."),
        BEST.removesuffix("!"),
        BEST + " Hello Hello Hello",
        BEST.replace("Have", FILLERS[0] + " Have"),
        BEST.replace("Have", RUDE[0] + " Have"),
        BEST + " " + "so " * 50 + "much.",
        BEST + " <eos>",
    ],
)
def test_hacks_do_not_gain(hack):
    assert rubric(ASK, hack) < rubric(ASK, BEST) == 8.0


def test_no_sampled_reply_beats_the_best_score():
    rng = random.Random(5)
    for request in sample_requests(500, seed=6):
        for quality in ("mixed", "good", "poor", "broken"):
            assert rubric(request.text, sample_reply(request, rng, quality)) <= 8.0


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip_and_special_tokens(tokenizer):
    for text in (prompt_of(parse_request(ASK)) + " " + BEST, "Ünïcode, tabs\t, 日本 and  two spaces\n", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)
    assert tokenizer("It is 5.<eos>").input_ids[-1] == EOS_ID
    assert len(tokenizer) <= 768


def test_prompt_and_reply_tokenise_apart_as_together(tokenizer):
    rng = random.Random(0)
    for request in sample_requests(300, seed=8):
        prompt, reply = prompt_of(request), " " + sample_reply(request, rng, rng.choice(("mixed", "broken")))
        together = tokenizer(prompt + reply).input_ids
        assert together == tokenizer(prompt).input_ids + tokenizer(reply).input_ids
        assert len(tokenizer(reply).input_ids) < 100


def test_mixed_replies_fit_in_48_tokens(tokenizer):
    rng = random.Random(0)
    lengths = [len(tokenizer(" " + sample_reply(r, rng)).input_ids) + 1 for r in sample_requests(1000, seed=9)]
    assert max(lengths) <= 48
    assert 12 < sum(lengths) / len(lengths) < 24


def test_tokenizer_is_deterministic(tokenizer):
    texts = [prompt_of(r) for r in sample_requests(300, seed=0)]
    first, second = (build_tokenizer(texts, 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_chat_template_gives_the_plain_prompt(tokenizer):
    user = {"role": "user", "content": ASK}
    prompt = prompt_of(parse_request(ASK))
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == prompt
    answered = [user, {"role": "assistant", "content": " It is 5."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt} It is 5.<eos>"


# --- models ----------------------------------------------------------------------------------------------------------


def test_policy_learns_the_reply_and_its_end(tokenizer):
    prompt = prompt_of(parse_request(ASK))
    model = new_policy(build_policy_config(tokenizer, hidden=32, layers=1, heads=1))
    train_policy(model, tokenizer, [(prompt, "It is 5.")] * 8, epochs=60, batch_size=8, learning_rate=1e-2)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert reply.tolist() == [*tokenizer(" It is 5.").input_ids, EOS_ID]


def test_reward_model_learns_who_won(tokenizer):
    request = parse_request(ASK)
    replies = (Reply("It is 6."), Reply(BEST), Reply("It is", ended=False))
    comparison = Comparison(prompt_of(request), replies, ((1, 0), (0, 2), (1, 2)))
    model = new_reward_model(build_reward_config(tokenizer, hidden=32, layers=1, heads=1))
    train_reward_model(model, tokenizer, [comparison] * 4, epochs=40, learning_rate=5e-3)
    texts = [f"{prompt_of(request)} {reply.text}" + "<eos>" * reply.ended for reply in replies]
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")).logits[:, 0]
    assert logits[1] > logits[0] + 1 and logits[0] > logits[2] + 1


def test_prompts_that_are_computed_once_give_the_scores_of_single_texts(tokenizer):
    items = sample_comparisons(sample_requests(12, seed=1, split="reward"), seed=1)
    model = new_reward_model(build_reward_config(tokenizer, hidden=32, layers=1, heads=2))
    with torch.no_grad():
        together = _scores(model, [_encode_comparison(tokenizer, item) for item in items])
        texts = [f"{item.prompt} {reply.text}" + "<eos>" * reply.ended for item in items for reply in item.replies]
        alone = torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])
    assert together.std() > 0.1 and torch.allclose(together, alone, atol=1e-5)


def test_reward_model_starts_from_the_policy(tokenizer):
    policy = new_policy(build_policy_config(tokenizer, hidden=32, layers=2, heads=1), seed=7)
    model = new_reward_model(build_reward_config(tokenizer, hidden=32, layers=2, heads=1), policy)
    assert model.config.num_hidden_layers == 3 and model.config.num_labels == 1
    assert torch.equal(model.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    copied = dict(model.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(copied[name], weight)


def test_making_a_model_leaves_the_global_random_state(tokenizer):
    state = torch.get_rng_state()
    first, second = (new_policy(build_policy_config(tokenizer, hidden=32, heads=1), seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_comparisons_are_wrong_as_often_as_their_gaps_say():
    requests = sample_requests(600, seed=0, split="reward")
    seen, right, expected = Counter(), Counter(), defaultdict(float)
    for item in sample_comparisons(requests, 1):
        scores = [rubric(item.prompt, reply.text) for reply in item.replies]
        for win, loss in item.wins:
            gap = abs(scores[win] - scores[loss])
            size = "small" if gap < 1.1 else "middle" if gap < 3 else "large"
            seen[size] += 1
            right[size] += scores[win] > scores[loss]
            expected[size] += 1 / (1 + math.exp(-gap))
    for size, count in seen.items():
        assert right[size] / count == pytest.approx(expected[size] / count, abs=2.5 / count**0.5)
    assert expected["small"] / seen["small"] < 0.75 and right["large"] / seen["large"] > 0.96


def test_accuracy_of_a_reward_model_is_its_share_of_right_replies_above_wrong_ones(tokenizer):
    requests = sample_requests(10, seed=2, split="validation")
    model = new_reward_model(build_reward_config(tokenizer, hidden=32, layers=1, heads=1))
    before = reward_model_accuracy(model, tokenizer, requests, seed=0)
    rng = random.Random(0)
    scores = [
        model(tokenizer(f"{prompt_of(r)} {text}<eos>", return_tensors="pt").input_ids).logits.item()
        for r in requests
        for _ in range(2)
        for text in right_and_wrong(r, rng)
    ]
    assert before == sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / 20
    with torch.no_grad():
        model.score.weight.neg_()
    assert reward_model_accuracy(model, tokenizer, requests, seed=0) == pytest.approx(1 - before)


def test_build_saves_models_that_load_and_prompts_of_their_splits(tmp_path):
    made = build(tmp_path, seed=3, size=SMALL)
    tokenizer = AutoTokenizer.from_pretrained(made.policy_dir)
    policy = AutoModelForCausalLM.from_pretrained(made.policy_dir)
    reward = AutoModelForSequenceClassification.from_pretrained(made.reward_dir)
    assert (policy.generation_config.eos_token_id, policy.generation_config.pad_token_id) == (EOS_ID, PAD_ID)
    assert (tokenizer.pad_token_id, reward.config.pad_token_id, reward.config.num_labels) == (PAD_ID, PAD_ID, 1)
    for file, split, count in (
        (made.prompts_train, "online", SMALL.prompts_train),
        (made.prompts_validation, "validation", SMALL.prompts_validation),
        (made.prompts_test, "test", SMALL.prompts_test),
    ):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            request = parse_request(row["prompt"])
            assert (split_of(request.text), request.answer, request.kind) == (split, row["answer"], row["kind"])


def test_openers_and_closers_do_not_look_like_replies():
    assert not set(map(str.strip, OPENERS + CLOSERS)) & {*GREETINGS, *CLOSINGS, *FILLERS, *RUDE}
