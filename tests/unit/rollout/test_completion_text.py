"""The text of a completion is what stands behind the prompt when both are decoded together."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.generation.stopping_criteria import StopStringCriteria

from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.completion_text import completion_texts
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.requests import Sampled, build_groups
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Completion, Group, Prompt
from support import tokenizer_kinds

WORDS = st.lists(st.sampled_from([*tokenizer_kinds.TEXT.split(), " ", "\n", "é", "🙂", "un", "<s>"]), max_size=60)


def ids_of(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def whole_decode(tokenizer, prompt_ids, ids):
    """The definition, as slow as it is."""
    before, joint = (
        tokenizer.decode(list(of), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for of in (prompt_ids, [*prompt_ids, *ids])
    )
    return joint[len(os.path.commonprefix([before, joint])) :]


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@settings(max_examples=60, deadline=None)
@given(words=WORDS, joined=st.sampled_from(["", " "]), cut=st.integers(0, 40), data=st.data())
def test_the_end_of_a_prompt_as_context_gives_what_the_whole_of_it_gives(kind, words, joined, cut, data):
    """For any tokens behind any prompt, also one that has lost its beginning."""
    tokenizer = tokenizer_kinds.tokenizer(kind)
    prompt_ids = ids_of(tokenizer, joined.join(words))[cut:]
    answers = data.draw(st.lists(st.lists(st.integers(0, len(tokenizer) - 1), max_size=6), min_size=2, max_size=2))
    texts = completion_texts(tokenizer, [Prompt("", prompt_ids, 0)], answers)
    assert texts == [whole_decode(tokenizer, prompt_ids, ids) for ids in answers]


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_that_is_cut_between_two_tokens_comes_back_whole(kind, data):
    """Wherever that is, but inside a character."""
    tokenizer = tokenizer_kinds.tokenizer(kind)
    ids = ids_of(tokenizer, tokenizer_kinds.TEXT)
    cut = data.draw(st.integers(1, len(ids) - 1))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    [text] = completion_texts(tokenizer, [Prompt("", ids[:cut], 0)], [ids[cut:]])
    assert whole.endswith(text)
    assert before.rstrip("\N{REPLACEMENT CHARACTER}") + text == whole


@pytest.mark.parametrize(
    ("kind", "prompt", "whole", "text"),
    [
        ("llama2", "eat t11", "eat t11 t13 and", " t13 and"),
        ("llama2", "caf", "café 🙂", "é 🙂"),
        ("gpt2", "eat t11", "eat t11 t13 and", " t13 and"),
        ("wordpiece", "eat t11", "eat t11 t13 and", " t13 and"),
        ("unigram", "eat t11", "eat t11 t13 and", " t13 and"),
        ("suffix", "eat t11", "eat t11 t13 and", " t13 and"),
    ],
)
def test_the_space_before_the_first_word_is_kept(kind, prompt, whole, text):
    tokenizer = tokenizer_kinds.tokenizer(kind)
    prompt_ids, ids = ids_of(tokenizer, prompt), ids_of(tokenizer, whole)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert completion_texts(tokenizer, [Prompt(prompt, prompt_ids, 0)], [ids[len(prompt_ids) :]]) == [text]


def test_bytes_of_one_character_on_both_sides_of_the_border_are_the_completions():
    tokenizer = tokenizer_kinds.tokenizer("gpt2")
    ids = ids_of(tokenizer, "a🙃 b")
    first = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]).endswith("\N{REPLACEMENT CHARACTER}"))
    assert completion_texts(tokenizer, [Prompt("a", ids[:first], 0)], [ids[first:]]) == ["🙃 b"]


def test_spaces_are_those_that_the_tokens_stand_for():
    """A tokenizer that is told to clean up would take away the space before the comma."""
    tokenizer = tokenizer_kinds.tokenizer("unigram")
    ids, prompt_ids = ids_of(tokenizer, "eat t11 , t13"), ids_of(tokenizer, "eat")
    tokenizer.clean_up_tokenization_spaces = True
    try:
        assert completion_texts(tokenizer, [Prompt("eat", prompt_ids, 0)], [ids[len(prompt_ids) :]]) == [" t11 , t13"]
    finally:
        tokenizer.clean_up_tokenization_spaces = False


CHAT = [{"role": "user", "content": "eat t11"}]
WRITES_THE_SPACE = tokenizer_kinds.CHAT_TEMPLATE
LEAVES_IT = WRITES_THE_SPACE.replace("' ' + m", "m")


@pytest.mark.parametrize(
    ("template", "messages", "content"),
    [
        (WRITES_THE_SPACE, CHAT, "t13 and"),
        (LEAVES_IT, CHAT, " t13 and"),
        (WRITES_THE_SPACE, [*CHAT, {"role": "assistant", "content": "the end"}], " t13 and"),
    ],
)
def test_an_answer_to_a_chat_is_rendered_as_the_model_wrote_it(template, messages, content):
    """The content of a message, so that the template gives back prompt and completion; or more of the last message."""
    tokenizer = tokenizer_kinds.tokenizer("llama2")
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        goes_on = len(messages) == 2
        before = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=goes_on)
        written = before + " t13 and"
        prompt_ids, ids = ids_of(tokenizer, before), ids_of(tokenizer, written)
        prompt = Prompt(messages, prompt_ids, 0)
        assert completion_texts(tokenizer, [prompt], [ids[len(prompt_ids) :]]) == [content]
        answer = messages[-1]["content"] + content if goes_on else content
        chat = [*CHAT, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == written + "</s>"
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] + 1 }}"])
def test_a_template_that_is_for_other_chats_takes_nothing_away(template):
    tokenizer = tokenizer_kinds.tokenizer("llama2")
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        prompt_ids, written = ids_of(tokenizer, "eat t11"), ids_of(tokenizer, "eat t11 t13 and")
        ids = written[len(prompt_ids) :]
        assert completion_texts(tokenizer, [Prompt(CHAT, prompt_ids, 0)], [ids]) == [" t13 and"]
    finally:
        tokenizer.chat_template = own


def llama_config(tokenizer, **overrides):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **overrides,
    )


@pytest.mark.parametrize("kind", ["llama2", "wordpiece", "unigram"])
def test_engines_and_scorers_have_the_text_that_the_model_wrote(kind):
    """A function sees prompt and completion as they are decoded together, of both engines alike."""
    torch.manual_seed(0)
    tokenizer = tokenizer_kinds.tokenizer(kind)
    prompt = Prompt("eat t11", ids_of(tokenizer, "eat t11"), 0)
    model = LlamaForCausalLM(llama_config(tokenizer)).eval()
    params = SamplingParams(max_new_tokens=5, end_token_ids=(tokenizer.eos_token_id,))
    [group] = TransformersEngine(model, tokenizer).generate([prompt], 16, params, RolloutKey(0, 0))
    seen = []
    FunctionScorer(lambda completions, **_: seen.extend(completions) or [0.0] * len(completions)).score([group])
    wrote = [whole_decode(tokenizer, prompt.token_ids, c.token_ids) for c in group.completions]
    assert seen == wrote and any(text.startswith(" ") for text in wrote)
    sampled = [Sampled(c.token_ids, c.logprobs, c.finish_reason) for c in group.completions]
    assert build_groups([prompt], sampled, tokenizer, 0) == [group]


def test_a_reward_model_reads_the_tokens_that_the_policy_wrote():
    """Where both have one tokenizer, and the completion is how that tokenizer would write its text."""
    tokenizer = tokenizer_kinds.tokenizer("llama2")
    written = ids_of(tokenizer, "eat t11 t13 and, the mouse")
    prompt_ids = ids_of(tokenizer, "eat t11")
    ids = written[len(prompt_ids) :]
    [text] = completion_texts(tokenizer, [Prompt("eat t11", prompt_ids, 0)], [ids])
    group = Group(Prompt("eat t11", prompt_ids, 0), (Completion(ids, (0.0,) * len(ids), "length", 0, text),))
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(tokenizer, num_labels=1)).eval()
    with torch.no_grad():
        expected = model(torch.tensor([written])).logits.item()
    assert RewardModelScorer(model, tokenizer).score([group]) == [[pytest.approx(expected, abs=1e-6)]]


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_stop_strings_are_found_in_that_text(kind, data):
    """Also those that begin with a space, at the first token, and characters of several tokens."""
    tokenizer = tokenizer_kinds.tokenizer(kind)
    text = " t13 and é🙂, the"
    prompt_ids, written = ids_of(tokenizer, "eat t11"), ids_of(tokenizer, "eat t11" + text)
    ids = written[len(prompt_ids) :]
    stop = data.draw(st.sampled_from([" t13", "t13", " and", "13 a", "é", "🙂", " the"]))
    found = [
        stop in completion_texts(tokenizer, [Prompt("", prompt_ids, 0)], [ids[:n]])[0] for n in range(1, len(ids) + 1)
    ]
    stopped = [bool(_stops(kind, stop)(torch.tensor([ids[:n]]), None)) for n in range(1, len(ids) + 1)]
    first = found.index(True) if True in found else None
    assert (stopped.index(True) if True in stopped else None) == first


CRITERIA = {}


def _stops(kind, stop):
    if (kind, stop) not in CRITERIA:
        CRITERIA[kind, stop] = StopStringCriteria(tokenizer_kinds.tokenizer(kind), [stop])
    return CRITERIA[kind, stop]
