"""Sizes of vocabularies and contexts that do not fit together are refused at the start, with the numbers."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from online_dpo import OnlineDPOTrainer
from online_dpo.cli.main import main
from online_dpo.errors import UnknownTokenError
from online_dpo.modeling.introspection import context_length, end_token_ids
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Completion, Group
from support import tiny, training
from support.endpoint import comparison

ROWS = tiny.VOCABULARY
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
GROUP = tiny.group(tiny.prompts([3])[0], [[5, 6], [7, 8, 9]])


def grown(*words: str, special: bool = False):
    """The usual tokenizer with further tokens, for which no model here has made room."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(words or ["new"]), special_tokens=special)
    return tokenizer


def reward_model(**options):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny.config("llama", num_labels=1, **options)).eval()


def made(tmp_path, *, model=None, tokenizer=None, texts=("w1 w2", "w3 w4"), ref_model=None, reward=None, **fields):
    return OnlineDPOTrainer(
        model=model or tiny.causal_lm(sharpness=1.0),
        ref_model=ref_model,
        reward_funcs=reward or training.word_reward,
        args=training.config(tmp_path, **fields),
        train_dataset=Dataset.from_dict({"prompt": list(texts)}),
        processing_class=tokenizer or tiny.tokenizer(),
    )


def resized(rows):
    model = tiny.causal_lm(sharpness=1.0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


# --- the policy -----------------------------------------------------------------------------------------------------


def test_a_prompt_whose_token_has_no_embedding_is_refused_with_its_row_and_the_numbers(tmp_path):
    with pytest.raises(UnknownTokenError) as error:
        made(tmp_path, tokenizer=grown(), texts=["w1 w2", "w3 new w4"])
    for part in (
        f"`train_dataset` has prompts with token {ROWS} ('new'), first in row 1",
        f"The policy has embeddings for {ROWS} tokens (ids 0 to {ROWS - 1})",
        f"Its tokenizer has {ROWS + 1} tokens",
        "`model.resize_token_embeddings(len(tokenizer))`",
    ):
        assert part in str(error.value)
    made(tmp_path, tokenizer=grown(), texts=["w1 w2", "w3 new w4"], model=resized(ROWS + 1), max_steps=1).train()


def test_tokens_that_no_prompt_has_are_no_matter(tmp_path):
    """As a padding token that was added for batches only; and more embeddings than tokens, as many models have."""
    trainer = made(tmp_path, tokenizer=grown("<padding>", special=True))
    trainer.train()
    made(tmp_path, model=resized(ROWS + 20)).train()


def test_a_prompt_for_evaluation_alone_is_checked_too(tmp_path):
    trainer = made(tmp_path, tokenizer=grown())
    with pytest.raises(UnknownTokenError, match=f"row 0: .* has token {ROWS}. The policy has embeddings for {ROWS}"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["new w1"]}))
    with pytest.raises(UnknownTokenError, match="`eval_dataset` has prompts"):
        OnlineDPOTrainer(
            model=tiny.causal_lm(),
            reward_funcs=training.word_reward,
            args=training.config(tmp_path),
            train_dataset=training.dataset(),
            eval_dataset=Dataset.from_dict({"prompt": ["w1 new"]}),
            processing_class=grown(),
        )


def test_a_stream_is_checked_where_it_is_read_after_a_checkpoint(tmp_path):
    rows = [{"prompt": "w1 w2"}] * 4 + [{"prompt": "w3 new"}] * 4
    trainer = OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=training.word_reward,
        args=training.config(tmp_path, max_steps=2),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=grown(),
    )
    with pytest.raises(UnknownTokenError, match=f"row 4: .* has token {ROWS}"):
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_policy_that_cannot_read_what_it_writes(tmp_path):
    policy = tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False)
    policy.set_input_embeddings(torch.nn.Embedding(ROWS - 4, 32))
    with pytest.raises(UnknownTokenError, match=f"chooses from {ROWS} tokens and has embeddings for {ROWS - 4}"):
        made(tmp_path, model=policy)


def test_end_tokens_beyond_the_vocabulary():
    policy, tokenizer = tiny.causal_lm(), grown("<|end|>", special=True)
    tokenizer.eos_token = "<|end|>"
    policy.generation_config.eos_token_id = [tiny.END, 50_000]
    assert end_token_ids(policy, tokenizer) == (tiny.END,)
    policy.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=f"chooses from {ROWS} tokens, and its end tokens are {ROWS}\\."):
        end_token_ids(policy, tokenizer)


def test_token_ids_in_generation_kwargs(tmp_path):
    for options in ({"suppress_tokens": [3, ROWS]}, {"bad_words_ids": [[1], [2, ROWS]]}, {"eos_token_id": ROWS}):
        with pytest.raises(UnknownTokenError, match=f"`{next(iter(options))}` holds {ROWS}.*ids 0 to {ROWS - 1}"):
            made(tmp_path, generation_kwargs=options)


# --- the reference --------------------------------------------------------------------------------------------------


def test_a_reference_with_fewer_embeddings(tmp_path):
    with pytest.raises(UnknownTokenError, match=rf"has embeddings for {ROWS} tokens.*may have token {ROWS} \('new'\)"):
        made(tmp_path, model=resized(ROWS + 1), tokenizer=grown(), ref_model=tiny.causal_lm())
    made(tmp_path, model=resized(ROWS + 1), tokenizer=grown(), ref_model=resized(ROWS + 1)).train()


def test_models_of_one_family_that_are_padded_otherwise_go_together(tmp_path):
    """Rows without a token are hardly ever sampled; where one is, the error says so."""
    trainer = made(tmp_path, model=resized(ROWS + 20), ref_model=tiny.causal_lm(), seed=1)
    assert trainer.sampler.vocabulary.rows == {"the policy": ROWS + 20, "the reference": ROWS}
    rare = Completion((6, ROWS + 3), (-1.0, -9.0), "length", 0, "w2")
    with pytest.raises(UnknownTokenError, match=f"A completion of the prompt .row 0: .* has token {ROWS + 3}. The ref"):
        trainer.sampler.vocabulary.check_groups([Group(tiny.prompts([3])[0], (rare, rare))])


def test_a_reference_with_less_room(tmp_path):
    with pytest.raises(ValueError, match="`ref_model` has room for 32 tokens, prompts and completions may have 64"):
        made(tmp_path, ref_model=tiny.causal_lm(max_position_embeddings=32))


# --- reward models and judges ---------------------------------------------------------------------------------------


def smaller_than_its_tokenizer(kind):
    model = reward_model(vocab_size=ROWS - 3)
    return (
        RewardModelScorer(model, tiny.tokenizer(), "small")
        if kind == "reward"
        else PairwiseModelJudge(model, tiny.tokenizer(), name="small")
    )


@pytest.mark.parametrize("kind", ["reward", "judge"])
def test_a_model_that_is_smaller_than_its_tokenizer(kind):
    owner = "Reward model" if kind == "reward" else "Judge"
    with pytest.raises(UnknownTokenError) as error:
        smaller_than_its_tokenizer(kind)
    assert f"{owner} `small` has embeddings for {ROWS - 3} tokens (ids 0 to {ROWS - 4})" in str(error.value)
    assert f"its tokenizer has {ROWS}, among them {ROWS - 3} ('w37')" in str(error.value)


@pytest.mark.parametrize("argument", ["reward_funcs", "judge", "eval_reward_funcs", "eval_judge"])
def test_folders_of_such_models_are_refused_wherever_they_are_given(tmp_path, argument):
    folder = tmp_path / "small"
    reward_model(vocab_size=ROWS - 3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    scored = {} if argument in ("reward_funcs", "judge") else {"reward_funcs": training.word_reward}
    with pytest.raises(UnknownTokenError, match=f"`small` has embeddings for {ROWS - 3} tokens"):
        OnlineDPOTrainer(
            model=tiny.causal_lm(),
            args=training.config(tmp_path),
            train_dataset=training.dataset(),
            processing_class=tiny.tokenizer(),
            **scored,
            **{argument: str(folder)},
        )


def test_a_padding_token_without_embedding_is_no_matter_and_a_warning_says_when_it_would_be(caplog):
    tokenizer = grown("<padding>", special=True)
    tokenizer.pad_token = "<padding>"
    with caplog.at_level(logging.WARNING):
        scorer = RewardModelScorer(reward_model(), tokenizer, "padded")
    assert "a text that contains 44 ('<padding>') literally cannot be read" in caplog.text
    alone = RewardModelScorer(reward_model(), tiny.tokenizer())
    assert scorer.score([GROUP]) == alone.score([GROUP])


def test_a_judge_whose_padding_token_has_no_embedding_judges_as_with_another(caplog):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=ROWS, num_labels=1, max_position_embeddings=32, initializer_range=0.5, **SIZES)
    model = BertForSequenceClassification(config)
    tokenizer = grown("<padding>", special=True)
    tokenizer.pad_token = "<padding>"
    template = "{prompt} <end> {first} <end> {second}"
    comparisons = [comparison("w1 w2 w3", "w4", prompt="w5"), comparison("w7", "w1 w9", prompt="w8 w2 w3")]
    said = PairwiseModelJudge(model, tokenizer, template=template).prefer(comparisons)
    assert said == pytest.approx(
        PairwiseModelJudge(model, tiny.tokenizer(), template=template).prefer(comparisons), abs=1e-6
    )
    assert None not in said


def test_tokens_of_the_chat_template_count_when_prompts_are_conversations():
    tokenizer = grown("<|user|>", special=True)
    tokenizer.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }} {% endfor %}"
    scorer = RewardModelScorer(reward_model(), tokenizer, "chat")
    assert len(scorer.score([GROUP])[0]) == 2  # texts do not go through the template
    with pytest.raises(UnknownTokenError, match=r"among them 44 \('<\|user\|>'\)"):
        scorer.check_chat_template()


def test_an_end_token_without_embedding_is_written_behind_every_text():
    tokenizer = grown("<|end|>", special=True)
    tokenizer.eos_token = "<|end|>"
    with pytest.raises(UnknownTokenError, match=r"among them 44 \('<\|end\|>'\)"):
        RewardModelScorer(reward_model(), tokenizer)


def test_positions_that_count_from_behind_the_padding_token():
    """RoBERTa's 514 positions are room for 512 tokens; the tokenizer of a fine-tuned one often does not say so."""
    config = RobertaConfig(vocab_size=ROWS, num_labels=1, max_position_embeddings=18, pad_token_id=1, **SIZES)
    model = RobertaForSequenceClassification(config).eval()
    assert context_length(model) == 16
    prompt = tiny.prompts([30])[0]
    scorer = RewardModelScorer(model, tiny.tokenizer())
    assert len(scorer.score([tiny.group(prompt, [[5, 6], [7]])])[0]) == 2
    assert scorer.truncated == 2


# --- commands -------------------------------------------------------------------------------------------------------


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_commands_say_it_in_one_line(tmp_path, capsys):
    small = saved(tmp_path / "small", reward_model(vocab_size=ROWS - 3), tiny.tokenizer())
    policy = saved(tmp_path / "policy", tiny.causal_lm(), grown())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 new"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n')
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl"), "--use_cpu", "--max_length", "64", "--max_new_tokens", "8"]
    of_policy = (
        f"(row 0: 'w1 new') has token {ROWS}. `{policy}` has embeddings for {ROWS} tokens (ids 0 to {ROWS - 1})."
    )
    of_small = f"Judge `small` has embeddings for {ROWS - 3} tokens"
    capsys.readouterr()
    for words, message in (
        (["eval", "--model", policy, "--against", policy, *prompts, "--reward", small], of_policy),
        (["judge", str(tmp_path / "pairs.jsonl"), "--pairwise-model", small], of_small),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback (most" not in said and "error: " in said


# --- vLLM -----------------------------------------------------------------------------------------------------------


def test_a_server_of_vllm_with_less_room(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = json.dumps({"data": [{"id": "policy", "max_model_len": 48}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=f"at {url} has room for 48 tokens.*may have 64.*--max-model-len"):
            made(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=url)
    finally:
        server.shutdown()
        server.server_close()
