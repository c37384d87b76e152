"""The Hugging Face hub as recipes and pages need it, offline: caches of tiny models and datasets under the real names.

    variables = make_hub(tmp_path / "hub")                       # all of them, in a few seconds
    variables = make_hub(tmp_path / "hub", "openai/gsm8k", "Qwen/Qwen2.5-0.5B")
    subprocess.run([..., "train", "recipes/gsm8k.yaml"], env=os.environ | variables)

The variables have to stand in the environment of a process before it imports `huggingface_hub` or `datasets`; forks of
that process need nothing more. A model lies where `huggingface_hub` keeps what it has downloaded, a dataset where
`datasets` keeps what it has prepared, so nothing has to be replaced in any library.

A model has the architecture, the special tokens and the kind of chat template of the real one, random weights in
bfloat16, and ends a completion of its own accord after about 15 tokens. A dataset has the real one's columns and
splits; its rows are made up here.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase, filename_prefix_for_split
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from support import pairwise_folders

Row = dict[str, Any]
HIDDEN = 64
END = "<|endoftext|>"
CHATML_END = "<|im_end|>"

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What models of one maker have in common."""

    config: type[PreTrainedConfig]
    specials: tuple[str, ...]
    template: str | None
    end: str
    """Ends an answer, where there is a template; without one `base_end` does."""
    base_end: str
    pad: str | None
    positions: int
    words: tuple[str, ...] = ()
    """Tokens of their own that are text all the same: they stay when special tokens are left out."""


CHATML_TOKENS = (END, "<|im_start|>", CHATML_END)
THOUGHT = ("<think>", "</think>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN2 = Family(Qwen2Config, CHATML_TOKENS, CHATML, CHATML_END, END, END, 32768)
QWEN3 = Family(Qwen3Config, CHATML_TOKENS, THINKING, CHATML_END, END, END, 40960, THOUGHT)
QWEN3_2507 = Family(Qwen3Config, CHATML_TOKENS, CHATML, CHATML_END, END, END, 262144, THOUGHT)
PYTHIA = Family(GPTNeoXConfig, (END,), None, END, END, None, 2048)
PYTHIA_TRL = Family(GPTNeoXConfig, (END, "[PAD]"), None, END, END, "[PAD]", 2048)
LLAMA3 = Family(LlamaConfig, LLAMA_TOKENS, HEADERS, "<|eot_id|>", "<|end_of_text|>", None, 131072)


@dataclass(frozen=True)
class Model:
    family: Family
    chat: bool = True
    reward: bool = False
    tied: bool = True


MODELS: dict[str, Model] = {
    **{f"Qwen/Qwen2.5-{size}": Model(QWEN2, chat=False) for size in ("0.5B", "1.5B", "3B")},
    **{f"Qwen/Qwen2.5-{size}-Instruct": Model(QWEN2) for size in ("0.5B", "1.5B", "3B")},
    **{f"Qwen/Qwen2.5-{size}": Model(QWEN2, chat=False, tied=False) for size in ("7B", "14B", "32B")},
    **{f"Qwen/Qwen2.5-{size}-Instruct": Model(QWEN2, tied=False) for size in ("7B", "14B", "32B")},
    **{f"Qwen/Qwen3-{size}": Model(QWEN3) for size in ("0.6B", "1.7B", "4B")},
    **{f"Qwen/Qwen3-{size}": Model(QWEN3, tied=False) for size in ("8B", "14B", "32B")},
    **{f"Qwen/Qwen3-{size}-Base": Model(QWEN3, chat=False) for size in ("0.6B", "1.7B", "4B")},
    "Qwen/Qwen3-4B-Instruct-2507": Model(QWEN3_2507),
    **{f"Skywork/Skywork-Reward-V2-Qwen3-{size}": Model(QWEN3, reward=True) for size in ("0.6B", "1.7B", "4B", "8B")},
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": Model(LLAMA3, reward=True),
    "meta-llama/Llama-3.2-1B-Instruct": Model(LLAMA3),
    "meta-llama/Llama-3.1-8B-Instruct": Model(LLAMA3, tied=False),
    **{f"EleutherAI/pythia-{size}": Model(PYTHIA, chat=False, tied=False) for size in ("70m", "160m", "410m", "1b")},
    "EleutherAI/pythia-1b-deduped": Model(PYTHIA, chat=False, tied=False),
    "trl-lib/pythia-1b-deduped-tldr-sft": Model(PYTHIA_TRL, chat=False, tied=False),
    "trl-lib/pythia-1b-deduped-tldr-rm": Model(PYTHIA_TRL, chat=False, reward=True),
    "trl-lib/Qwen2-0.5B-Reward": Model(QWEN2, reward=True),
    "Qwen/Qwen2-0.5B-Instruct": Model(QWEN2),
}
PAIRRM = "llm-blender/PairRM-hf"


def make_hub(folder: Path, *names: str) -> dict[str, str]:
    """Write a cache with the models and datasets of these names, or with all, and return the variables to set."""
    known = [*MODELS, *DATASETS, PAIRRM]
    if unknown := set(names) - set(known):
        raise KeyError(f"add to tests/support/hub.py: {', '.join(sorted(unknown))}")
    tokenizers: dict[Family, PreTrainedTokenizerFast] = {}
    for name in names or known:
        if name in DATASETS:
            write_dataset(folder / "datasets", name)
        elif name == PAIRRM:
            pairwise_folders.pairrm_folder(snapshot(folder / "hub", name))
        else:
            write_model(folder / "hub", name, tokenizers)
    return {
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }


def snapshot(hub: Path, name: str) -> Path:
    """The folder of the only commit of a model, as `huggingface_hub` lays it out."""
    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    made = repository / "snapshots" / commit
    made.mkdir(parents=True, exist_ok=True)
    return made


# ---------------------------------------------------------------------------------------------------------- models


def write_model(hub: Path, name: str, tokenizers: dict[Family, PreTrainedTokenizerFast]) -> None:
    made = MODELS[name]
    folder = snapshot(hub, name)
    family = made.family
    if family not in tokenizers:
        tokenizers[family] = new_tokenizer(family)
    tokenizer = tokenizers[family]
    tokenizer.chat_template = family.template if made.chat else None
    tokenizer.eos_token = family.end if made.chat else family.base_end
    tokenizer.save_pretrained(folder)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = reward_model(made, tokenizer) if made.reward else policy(made, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)


def new_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Bytes and the common pieces of this file's own rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [json.dumps(row) for made in DATASETS.values() for row in made.rows(random.Random(0), 4)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=list(family.specials), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(word, normalized=False) for word in family.words])
    first = {"bos_token": family.specials[0]} if family is LLAMA3 else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.end,
        pad_token=family.pad,
        model_max_length=family.positions,
        **first,
    )


def config(made: Model, tokenizer: PreTrainedTokenizerFast, **more: object) -> PreTrainedConfig:
    """Small, with heads of a size that vLLM has code for and blocks that can be held in 4 bits."""
    family = made.family
    shape: dict[str, object] = dict(
        vocab_size=len(tokenizer) + 8,  # real models have more rows than tokens
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=family.positions,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=made.tied,
    )
    if family.config is not GPTNeoXConfig:
        shape["num_key_value_heads"] = 1
    if family.config in (Qwen3Config, LlamaConfig):
        shape["head_dim"] = 32
    return family.config(**shape, **more)


def policy(made: Model, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Ends its answers: all embeddings have a direction in common, which the end's output row has too."""
    model = AutoModelForCausalLM.from_config(config(made, tokenizer))
    common = common_direction()
    with torch.no_grad():
        embed = model.get_input_embeddings().weight
        embed.copy_(0.5 * directions(len(embed)) + common)
        head = model.get_output_embeddings().weight
        if head is not embed:
            head.copy_(0.5 * directions(len(head)))
        head[tokenizer.eos_token_id] += 0.5 * common
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(made.family.base_end)}, reverse=made.chat)
    model.generation_config = GenerationConfig(
        eos_token_id=ends if made.chat else ends[0],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20) if made.chat else {}),
    )
    return model


def reward_model(made: Model, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(config(made, tokenizer, num_labels=1))
    model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        embed = model.get_input_embeddings().weight
        embed.copy_(directions(len(embed)))
        model.score.weight.normal_(std=HIDDEN**-0.5)
    return model


def common_direction() -> torch.Tensor:
    """Of length 1, with a mean of 0, which layer norms take away."""
    return torch.tensor([1.0, -1.0] * (HIDDEN // 2)) / HIDDEN**0.5


def directions(rows: int) -> torch.Tensor:
    """Random ones of about length 1, without a share of the common one."""
    made = torch.randn(rows, HIDDEN) / HIDDEN**0.5
    common = common_direction()
    return made - (made @ common)[:, None] * common


# -------------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Made:
    """A dataset: its columns, and ``rows(random, count)``."""

    features: Features
    rows: Callable[[random.Random, int], Iterator[Row]]
    splits: tuple[str, ...] = ("train", "test")
    config: str = "default"


def write_dataset(cache: Path, name: str, count: int = 64) -> None:
    """As `datasets` leaves it after the first `load_dataset(name, config)`."""
    made = DATASETS[name]
    owner, short = name.split("/")
    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    folder = cache / f"{owner}___{camelcase_to_snakecase(short)}" / made.config / "0.0.0" / commit
    folder.mkdir(parents=True, exist_ok=True)
    splits = SplitDict(dataset_name=short)
    for split in made.splits:
        rows = made.rows(random.Random(zlib.crc32(f"{name} {split}".encode())), count)
        path = folder / f"{filename_prefix_for_split(short, split)}.arrow"
        with ArrowWriter(path=str(path), features=made.features) as writer:
            for row in rows:
                writer.write(row)
            examples, size = writer.finalize()
        splits.add(SplitInfo(name=split, num_bytes=size, num_examples=examples, dataset_name=short))
    DatasetInfo(
        features=made.features, builder_name="parquet", dataset_name=short, config_name=made.config, splits=splits
    ).write_to_directory(str(folder))


TEXT = Value("string")
MESSAGES = [{"role": TEXT, "content": TEXT}]
NAMES = ("Ada", "Bo", "Chen", "Dara", "Emil", "Femi", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "tickets", "stamps", "plants", "cups")
TOPICS = ("a walk in the rain", "how bread rises", "a late train", "keeping bees", "the first snow", "old maps")
ASKS = ("Write two sentences about", "Explain to a child", "Give three tips on", "Make a short poem of")
REPLIES = ("It depends on the weather.", "Begin early and take your time.", "Ask a friend who has done it before.")
CONSTRAINTS = {
    "validate_lowercase": "Your whole answer has to be in lower case.",
    "verify_paragraph_count": "Your answer has to have 2 paragraphs, separated by ***.",
    "verify_keywords": "Use the words rain and road.",
}


def ask(chance: random.Random) -> str:
    return f"{chance.choice(ASKS)} {chance.choice(TOPICS)}."


def sum_question(chance: random.Random) -> tuple[str, str, int]:
    """A question, its answer in the form of GSM8K, and the number."""
    name, thing = chance.choice(NAMES), chance.choice(THINGS)
    boxes, each, gone = chance.randint(2, 9), chance.randint(3, 12), chance.randint(1, 5)
    total = boxes * each - gone
    question = f"{name} has {boxes} boxes of {each} {thing} and gives {gone} away. How many {thing} are left?"
    answer = (
        f"{name} had {boxes}*{each} = <<{boxes}*{each}={boxes * each}>>{boxes * each} {thing}.\n"
        f"Then {boxes * each}-{gone} = <<{boxes * each}-{gone}={total}>>{total} are left.\n#### {total}"
    )
    return question, answer, total


def gsm8k(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        question, answer, _ = sum_question(chance)
        yield {"question": question, "answer": answer}


def hh(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        turns = ("Human: " + ask(chance), "Assistant: Gladly. For whom?", f"Human: For {chance.choice(NAMES)}.")
        start = "".join(f"\n\n{turn}" for turn in (*turns, "Assistant:"))
        good, bad = chance.sample(REPLIES, 2)
        yield {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}


def tldr(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        name, topic = chance.choice(NAMES), chance.choice(TOPICS)
        post = f"My friend {name} and I talked about {topic}. We did not agree, and now I do not know what to say."
        prompt = f"SUBREDDIT: r/advice\n\nTITLE: {name} and {topic}\n\nPOST: {post}\n\nTL;DR:"
        yield {"prompt": prompt, "completion": f" {name} and I disagree about {topic}; what now?"}


def instructions(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        yield {"prompt": [{"role": "user", "content": ask(chance)}]}


def preferences(chance: random.Random, count: int) -> Iterator[Row]:
    for number in range(count):
        prompt = ask(chance)
        good, bad = chance.sample(REPLIES, 2)
        asked = {"role": "user", "content": prompt}
        chosen, rejected = ([asked, {"role": "assistant", "content": text}] for text in (good, bad))
        yield {
            "prompt": prompt,
            "prompt_id": f"{number:064x}",
            "chosen": chosen,
            "rejected": rejected,
            "messages": chosen,
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        }


def chosen_rejected(chance: random.Random, count: int) -> Iterator[Row]:
    for row in preferences(chance, count):
        yield {name: row[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")}


def verifiable(chance: random.Random, count: int) -> Iterator[Row]:
    """Rows of three kinds, by turns; `ground_truth` is a number, a term, or the arguments of a check."""
    for number in range(count):
        question, _, total = sum_question(chance)
        kind = ("gsm8k", "MATH", "ifeval")[number % 3]
        row = {"dataset": kind, "constraint_type": None, "constraint": None}
        if kind == "ifeval":
            name, constraint = chance.choice(list(CONSTRAINTS.items()))
            arguments = {"func_name": name, "N": None, "keyword_list": None}
            arguments |= {"N": 2} if name == "verify_paragraph_count" else {}
            arguments |= {"keyword_list": ["rain", "road"]} if name == "verify_keywords" else {}
            row |= {"constraint_type": name, "constraint": constraint}
            question, truth = f"{ask(chance)} {constraint}", json.dumps(arguments)
        else:
            truth = str(total) if kind == "gsm8k" else rf"\frac{{{total}}}{{7}}"
        yield {"messages": [{"role": "user", "content": question}], "ground_truth": truth, **row}


def solved(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        question, _, total = sum_question(chance)
        yield {"prompt": [{"role": "user", "content": question}], "solution": f"${total}$"}


def long_documents(chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        pages = [
            f"{chance.choice(NAMES)} wrote to {chance.choice(NAMES)} about {chance.choice(TOPICS)}." for _ in range(60)
        ]
        text = " ".join(pages)
        asked = {"role": "user", "content": f"{text}\n\nWho wrote most letters?"}
        yield {
            "messages": [asked, {"role": "assistant", "content": f"{chance.choice(NAMES)} did."}],
            "length": len(text),
        }


DATASETS: dict[str, Made] = {
    "openai/gsm8k": Made(Features(question=TEXT, answer=TEXT), gsm8k, config="main"),
    "Anthropic/hh-rlhf": Made(Features(chosen=TEXT, rejected=TEXT), hh),
    "trl-lib/tldr": Made(Features(prompt=TEXT, completion=TEXT), tldr, ("train", "validation", "test")),
    "trl-lib/ultrafeedback-prompt": Made(Features(prompt=MESSAGES), instructions),
    "trl-lib/ultrafeedback_binarized": Made(
        Features(chosen=MESSAGES, rejected=MESSAGES, score_chosen=Value("float64"), score_rejected=Value("float64")),
        chosen_rejected,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": Made(
        Features(
            prompt=TEXT,
            prompt_id=TEXT,
            chosen=MESSAGES,
            rejected=MESSAGES,
            messages=MESSAGES,
            score_chosen=Value("float64"),
            score_rejected=Value("float64"),
        ),
        preferences,
        ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
    ),
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": Made(
        Features(messages=MESSAGES, ground_truth=TEXT, dataset=TEXT, constraint_type=TEXT, constraint=TEXT),
        verifiable,
        ("train",),
    ),
    "trl-lib/DeepMath-103K": Made(Features(prompt=MESSAGES, solution=TEXT), solved),
    "zai-org/LongAlign-10k": Made(Features(messages=MESSAGES, length=Value("int64")), long_documents, ("train",)),
}
