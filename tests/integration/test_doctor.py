"""`online-dpo doctor` finds what is planted in a run, and says nothing about runs that are well."""

import json
import os
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from online_dpo.cli.main import main
from online_dpo.doctor.examine import CHECKS
from support import tiny
from support.busy import tries
from support.plugins import names_restored
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
def slow(completions, **_): time.sleep(6); return [float(text.count("w1")) for text in completions]
def needs_label(completions, label, **_): return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("doctor"), REWARDS)


@pytest.fixture
def folder(whole, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
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


def own_policy(folder, family="llama", **config):
    """A policy of one's own in the place of the shared one."""
    (folder / "policy").unlink()
    tiny.causal_lm(family, sharpness=1.0, **config).save_pretrained(folder / "policy")
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


NULL = "(null)"


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
    (path / "chat_template.jinja").write_text(template)
    (folder / "own.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "w1 w2"}]}))
    return {"dataset_name": "own.jsonl"}


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
    """A policy for which the end token's logit is always far below the others."""
    path = own_policy(folder, family="gpt2", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[tiny.EOS] = -1.0
    model.save_pretrained(path)
    return {}


def plant_large_model(folder):
    """A config of a model with 2 billion weights. They are never loaded."""
    edit(own_policy(folder) / "config.json", hidden_size=8192, intermediate_size=28672)
    return {}


class Endpoint(BaseHTTPRequestHandler):
    """A judge's endpoint, and what `online-dpo serve` answers."""

    def do_GET(self):
        self.answer({"data": [{"id": self.server.model, "root": self.server.model, "max_model_len": 4096}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.path == "/collective_rpc":
            return self.answer({"results": ["0"]})
        usage = {"prompt_tokens": 300, "completion_tokens": 2}
        self.answer({"choices": [{"message": {"content": self.server.says}}], "usage": usage})

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def endpoint(model="policy", says="A"):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.model, server.says, server.asked = model, says, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


PLANTED = {
    # name: (fields or a function that plants and returns fields, check, mark, a part of what is said)
    "unknown field": ({"betta": 0.1}, "run file", "problem", "Did you mean `beta`"),
    "no such model": ({"model_name_or_path": "./nothing"}, "run file", "problem", "there is no"),
    "no such data": ({"dataset_name": "nothing.jsonl"}, "run file", "problem", "there is no"),
    "no such function": ({"reward_funcs": "feedback.py:nothing"}, "run file", "problem", "nothing"),
    "no such column": ({"reward_funcs": "feedback.py:needs_label"}, "files", "problem", "label"),
    "no room for prompts": ({"max_length": 8, "max_new_tokens": 8}, "settings", "problem", "leaves no room"),
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
        lambda f: {**rows(f, ["w1 " * 125] * 8), "max_length": NULL},
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
        "models",
        "problem",
        "one label",
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
    "no judge of evaluations": (
        {
            "eval_dataset_name": "data.jsonl",
            "eval_judge": "llm",
            "eval_judge_kwargs": {"model": "m", "base_url": "http://127.0.0.1:9/v1", "cache": None},
        },
        "judge",
        "problem",
        "`eval_judge_kwargs`",
    ),
    "gold that is missing": (
        {"eval_dataset_name": "data.jsonl", "eval_reward_funcs": "feedback.py:missing"},
        "rewards",
        "problem",
        "Evaluations report nothing",
    ),
    "a policy that never ends": (plant_never_ends, "samples", "warning", "none ended"),
    "a large model on a CPU": (plant_large_model, "device", "warning", "no GPU is used"),
    "a model that does not fit": (plant_large_model, "memory", "problem", "are free"),
    "a disk that fills": (
        {"save_strategy": "steps", "save_steps": 1, "max_steps": 10**9},
        "disk",
        "problem",
        "save_total_limit",
    ),
    "a context that is too short": ({"max_length": 500}, "prompts", "problem", "at most 128"),
    "an ignored field": ({"lora_r": 8}, "run file", "warning", "ignored"),
    "a learning rate of 5": ({"learning_rate": 5.0}, "settings", "problem", "ruins a language model"),
    "a plugin that fails": ({"plugins": ["broken.py"]}, "run file", "problem", "broken.py"),
    "no tracker": ({"report_to": "neptune"}, "run file", "problem", "neptune"),
}


@pytest.mark.parametrize("name", PLANTED)
@tries(3)  # rewards are slow beside sampling and training, which a busy machine may make slow too
def test_what_is_planted_is_found(folder, capsys, name):
    fields, check, mark, said = PLANTED[name]
    fields = fields(folder) if callable(fields) else fields
    run_file = write_run_file(folder, **{"reward_funcs": "feedback.py:words", **fields})
    run_file.write_text(run_file.read_text().replace(NULL, "null"))
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


def judged(url, **more):
    options = {"model": "m", "base_url": f"{url}/v1", "input_price": 1.0, "logprobs": False, **more}
    return {"reward_funcs": None, "judge": "llm", "judge_kwargs": options}


def test_a_judge_is_asked_and_a_step_is_priced(folder, capsys, tmp_path):
    with endpoint() as (server, url):
        report, found = examined(capsys, write_run_file(folder, **judged(url, cache=str(tmp_path / "cache"))))
    assert found == []
    [said] = [one for one in report["findings"] if one["check"] == "judge"]
    # 8 prompts a step of 4 completions: at most 5 comparisons each, in both orders
    assert said["facts"]["questions_a_step"] == 8 * 5 * 2
    assert said["facts"]["price_a_step"] == pytest.approx(8 * 5 * 2 * 300 / 1e6)
    assert len(server.asked) == 2 and not (tmp_path / "cache").exists()


def test_a_judge_without_a_verdict(folder, capsys):
    with endpoint(says="I cannot say.") as (_, url):
        _, found = examined(capsys, write_run_file(folder, **judged(url)), "--quick")
    assert [one[:2] for one in found] == [("judge", "problem")]
    assert "no verdict" in found[0][2]


def test_a_budget_that_ends_the_run(folder, capsys):
    with endpoint() as (_, url):
        run_file = write_run_file(folder, max_steps=1000, **judged(url, max_cost=1.0))
        _, found = examined(capsys, run_file, "--quick")
    assert [one[:2] for one in found] == [("judge", "warning")] and "`max_cost`" in found[0][2]


def served(url, **more):
    fields = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, **more}
    return {"reward_funcs": "feedback.py:words", **fields}


def test_a_server_with_the_same_model(folder, capsys):
    with endpoint(str(folder / "policy")) as (_, url):
        _, found = examined(capsys, write_run_file(folder, **served(url)))
    assert found == []


def test_a_server_with_another_model(folder, capsys):
    with endpoint("Qwen/Qwen3-8B") as (_, url):
        _, found = examined(capsys, write_run_file(folder, **served(url)), "--quick")
    assert [one[:2] for one in found] == [("servers", "problem")]
    assert "Qwen/Qwen3-8B" in found[0][2] and "online-dpo serve" in found[0][2]


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as other, endpoint("policy") as (_, url):
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        run_file = write_run_file(folder, **served(url, vllm_weight_transfer="broadcast", vllm_group_port=port))
        _, found = examined(capsys, run_file, "--quick")
    assert [one[:2] for one in found] == [("servers", "problem")] and str(port) in found[0][2]


ZERO3 = {
    "zero_optimization": {"stage": 3},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


@pytest.mark.parametrize("fields", [{"fsdp": True}, {"deepspeed": ZERO3}, {"fsdp": True, "use_peft": True}], ids=str)
def test_a_run_of_several_processes(folder, capsys, fields):
    if "deepspeed" in fields:
        pytest.importorskip("deepspeed")
        (folder / "zero3.json").write_text(json.dumps(ZERO3))
        fields = {"deepspeed": "zero3.json"}
    run_file = write_run_file(folder, reward_funcs="feedback.py:words", **fields)
    report, found = examined(capsys, run_file, "--processes", 2)
    assert found == []
    said = {one["check"]: one["found"] for one in report["findings"]}
    assert said["settings"].startswith("16 prompts a step") and "2 of them" in said["memory"]
    assert "WORLD_SIZE" not in os.environ


def test_quick_loads_no_model(folder, capsys):
    (folder / "policy").unlink()
    tiny.config("llama").save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    report, found = examined(capsys, write_run_file(folder, reward_funcs="feedback.py:constant"), "--quick")
    assert found == []
    skipped = [one["check"] for one in report["findings"] if one["mark"] == "skipped"]
    assert skipped == ["models", "samples", "rewards", "time"]


@pytest.mark.parametrize("number", ["0", "-2", "two"])
def test_a_number_of_processes_that_is_none(folder, capsys, number):
    run_file = write_run_file(folder, reward_funcs="feedback.py:words")
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(run_file), "--processes", number])
    assert "1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "- a list", "a: [", "a: \xff"])
def test_a_run_file_that_cannot_be_read(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text, encoding="latin-1")
    assert main(["doctor", str(tmp_path / "run.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_a_check_of_a_plugin(folder, capsys):
    """That of docs/project/extending.md."""
    page = (Path(__file__).parents[2] / "docs" / "project" / "extending.md").read_text()
    text = page.split("# my_check.py\n")[1].split("```")[0]
    (folder / "my_check.py").write_text(text)
    run_file = write_run_file(folder, reward_funcs="feedback.py:words", plugins=["my_check.py"])
    with names_restored():
        assert "memory" in CHECKS
        _, found = examined(capsys, run_file, "--quick")
    assert found == [("answers", "problem", "8 rows have no answer -> Leave them out.")]


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["gsm8k", "hh"])
def test_nothing_is_said_of_a_recipe(folder, capsys, name):
    words = ["--output_dir", folder / "out", "--use_cpu", "true"]
    if name == "gsm8k":
        made = [{"question": f"w{n} w{n} w{n}", "answer": f"w{n}\n#### {n}"} for n in range(64)]
        words += ["--dataset_config", "null"]
    else:
        made = [{"chosen": f"\n\nHuman: w{n} w1\n\nAssistant: w2 w{n}", "rejected": "w"} for n in range(39)]
        words += ["--reward_model_path", reward_model(folder)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    own_policy(folder, max_position_embeddings=1024)
    words += ["--model_name_or_path", folder / "policy", "--dataset_name", folder / "rows.jsonl"]
    _, found = examined(capsys, RECIPES / f"{name}.yaml", *words)
    assert found == []


@pytest.mark.slow
def test_nothing_is_said_of_the_recipe_for_qlora(folder, capsys):
    pytest.importorskip("bitsandbytes")
    from support import quantized

    made = [{"question": f"w{n} w{n} w{n}", "answer": f"w{n}\n#### {n}"} for n in range(39)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    policy = quantized.base_folder(folder / "base", max_position_embeddings=1024)
    words = ["--model_name_or_path", policy, "--dataset_name", folder / "rows.jsonl", "--dataset_config", "null"]
    words += ["--output_dir", folder / "out", "--use_cpu", "true", "--bf16", "true"]
    _, found = examined(capsys, RECIPES / "qlora.yaml", *words)
    assert found == []


@pytest.mark.slow
def test_nothing_is_said_of_the_quickstart(tmp_path, capsys, monkeypatch):
    from online_dpo.quickstart.artifacts import build
    from online_dpo.quickstart.models import TINY
    from online_dpo.quickstart.run import write_run_file as write_quickstart

    monkeypatch.chdir(tmp_path)
    build(Path("runs/quickstart/start"), size=TINY)
    report, found = examined(capsys, write_quickstart(Path("runs/quickstart")), "--use_cpu", "true")
    assert found == []
