"""`online-dpo doctor` finds what is planted in a run, and says nothing about runs that are well."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from online_dpo.cli.main import main
from support import tiny
from support.run_files import fill_folder, write_run_file

REWARDS = """
import time
def words(completions, **_): return [float(text.count("w1")) for text in completions]
def constant(completions, **_): return [1.0] * len(completions)
def sparse(completions, **_): return [float(text == "Yes.") for text in completions]
def of_prompt(prompts, completions, **_): return [float(sum(map(ord, prompt)) % 7) for prompt in prompts]
def length(completions, completion_ids, **_): return [float(len(ids)) for ids in completion_ids]
def nan(completions, **_): return [float("nan") if i % 2 else 1.0 * i for i in range(len(completions))]
def missing(completions, **_): return [None] * len(completions)
def raises(completions, **_): return [1 / 0 for _ in completions]
def slow(completions, **_): time.sleep(1.5); return [float(text.count("w1")) for text in completions]
def needs_label(completions, label, **_): return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("doctor"), REWARDS)


@pytest.fixture
def folder(whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def examined(capsys, run_file, *words):
    """The exit code, and the findings that are not ok, as (check, mark, text)."""
    code = main(["doctor", str(run_file), "--json", *map(str, words)])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    return report, [
        (one["check"], one["mark"], f"{one['found']} -> {one['change']}")
        for one in report["findings"]
        if one["mark"] in ("problem", "warning")
    ]


def own_policy(folder, **config):
    """A copy of the policy in the place of the shared one."""
    (folder / "policy").unlink()
    tiny.causal_lm(sharpness=1.0, **config).save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    return folder / "policy"


def edit(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


def reward_model(folder, pad=tiny.PAD, labels=1, tokenizer=None):
    config = LlamaConfig(**{**tiny.config("llama").to_dict(), "pad_token_id": pad, "num_labels": labels})
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    (tokenizer or tiny.tokenizer()).save_pretrained(folder / "rm")
    return folder / "rm"


def rows(folder, texts):
    (folder / "own.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return {"dataset_name": "own.jsonl"}


def plant_end_token(folder):
    path = own_policy(folder)
    edit(path / "generation_config.json", eos_token_id="gone")
    edit(path / "config.json", eos_token_id=None)
    edit(path / "tokenizer_config.json", eos_token="gone")
    return {}


def plant_turn_end(folder):
    path = own_policy(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = tiny.CHAT_TEMPLATE.replace("<end>", "<|im_end|>")
    tokenizer.chat_template = template
    names = {"<end>": "<|im_end|>"}
    content = json.loads((path / "tokenizer.json").read_text().replace("<end>", names["<end>"]))
    (path / "tokenizer.json").write_text(json.dumps(content))
    edit(path / "tokenizer_config.json", chat_template=template, additional_special_tokens=["<|im_end|>"])
    return {}


def plant_added_token(folder):
    path = own_policy(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new1", "new2"])
    tokenizer.save_pretrained(path)
    return {}


def plant_two_first_tokens(folder):
    path = own_policy(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<end>"
    tokenizer.save_pretrained(path)
    return rows(folder, ["<end> <end> w1 w2"] * 8)


def plant_no_generation_prompt(folder):
    path = own_policy(folder)
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{% if add_generation_prompt %}w0 {% endif %}", "")
    tokenizer.save_pretrained(path)
    (folder / "own.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "w1 w2"}]}))
    return {"dataset_name": "own.jsonl"}


def plant_never_ends(folder):
    path = own_policy(folder, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = 0
        model.model.norm.weight.fill_(20)
        model.lm_head.weight[5:] *= 5
        ends = model.lm_head.weight[5:].mean(0)
        model.lm_head.weight[tiny.EOS] = -50 * ends
    model.config.eos_token_id = model.generation_config.eos_token_id = tiny.END
    with torch.no_grad():
        model.lm_head.weight[:5] = 0
        model.lm_head.weight[5:] = torch.eye(32)[:1] * 0
        model.lm_head.weight[5:, :] += model.model.norm.weight[None] * 0
    model.save_pretrained(path)
    return {}


PLANTED = {
    # name: (fields or a function that plants and returns fields, check, mark, a part of what is said)
    "unknown field": ({"betta": 0.1}, "run file", "problem", "Did you mean `beta`"),
    "no such model": ({"model_name_or_path": "./nothing"}, "run file", "problem", "there is no"),
    "no such data": ({"dataset_name": "nothing.jsonl"}, "run file", "problem", "there is no"),
    "no such function": ({"reward_funcs": "feedback.py:nothing"}, "run file", "problem", "nothing"),
    "no such column": ({"reward_funcs": "feedback.py:needs_label"}, "files", "problem", "label"),
    "no room for prompts": ({"max_length": 8, "max_new_tokens": 8}, "files", "problem", "leaves no room"),
    "constant reward": ({"reward_funcs": "feedback.py:constant"}, "rewards", "problem", "is constant"),
    "reward of the prompt": ({"reward_funcs": "feedback.py:of_prompt"}, "rewards", "problem", "same score"),
    "reward of the length": ({"reward_funcs": "feedback.py:length"}, "rewards", "problem", "length"),
    "reward that is NaN": ({"reward_funcs": "feedback.py:nan"}, "rewards", "problem", "NaN"),
    "reward that is missing": ({"reward_funcs": "feedback.py:missing"}, "rewards", "problem", "no score"),
    "reward that fails": ({"reward_funcs": "feedback.py:raises"}, "rewards", "problem", "division by zero"),
    "slow reward": ({"reward_funcs": "feedback.py:slow"}, "time", "warning", "rewards take"),
    "low temperature": ({"temperature": 1e-4}, "samples", "problem", "all the same"),
    "prompts that are cut": (lambda f: {**rows(f, ["w1 " * 90] * 8)}, "prompts", "problem", "lose their beginning"),
    "prompts for no answer": (
        lambda f: {**rows(f, ["w1 " * 125] * 8), "max_length": None},
        "prompts",
        "problem",
        "no room",
    ),
    "rows that are empty": (
        lambda f: {**rows(f, ["", "w1 w2"] * 4), "invalid_prompts": "filter"},
        "prompts",
        "warning",
        "left out",
    ),
    "no end token": (plant_end_token, "tokens", "problem", "no token ends a completion"),
    "another end of a turn": (plant_turn_end, "tokens", "problem", "<|im_end|>"),
    "a tokenizer of another size": (plant_added_token, "tokens", "problem", "has embeddings for"),
    "two first tokens": (plant_two_first_tokens, "template", "problem", "twice"),
    "no generation prompt": (plant_no_generation_prompt, "template", "warning", "where the answer begins"),
    "reward model without padding": (
        lambda f: {"reward_funcs": None, "reward_model_path": str(reward_model(f, pad=None))},
        "tokens",
        "warning",
        "pad_token_id",
    ),
    "reward model of two labels": (
        lambda f: {"reward_funcs": None, "reward_model_path": str(reward_model(f, labels=2))},
        "run file",
        "problem",
        "2 labels",
    ),
    "two processes that share nothing": ({"fsdp": True}, "run file", "problem", "only one"),
    "no server": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9"},
        "servers",
        "problem",
        "127.0.0.1:9",
    ),
    "no Ray cluster": ({"ray": {"address": "127.0.0.1:9"}}, "servers", "problem", "no Ray cluster"),
    "no judge": (
        {
            "reward_funcs": None,
            "judge": "llm",
            "judge_kwargs": {"model": "m", "base_url": "http://127.0.0.1:9/v1", "cache": None},
        },
        "judge",
        "problem",
        "127.0.0.1:9",
    ),
    "no tracker": ({"report_to": "neptune"}, "files", "problem", "neptune"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(folder, capsys, name):
    fields, check, mark, said = PLANTED[name]
    fields = fields(folder) if callable(fields) else fields
    run_file = write_run_file(folder, **{"reward_funcs": "feedback.py:words", **fields})
    report, found = examined(capsys, run_file)
    assert any(one[:2] == (check, mark) and said in one[2] for one in found), (name, found)
    assert not (folder / "out").exists()


def test_a_run_that_is_well(folder, capsys):
    report, found = examined(capsys, write_run_file(folder, reward_funcs="feedback.py:words"))
    assert found == []
    assert [one["check"] for one in report["findings"]][0] == "run file"
    assert not (folder / "out").exists()


def test_a_sparse_reward_is_no_constant_one(folder, capsys):
    report, found = examined(capsys, write_run_file(folder, reward_funcs="feedback.py:sparse"))
    assert found == []
    [said] = [one["found"] for one in report["findings"] if one["check"] == "rewards"]
    assert "other scores to other texts (up to 1)" in said
