"""Model folders that are damaged, of another kind, or hostile."""

from __future__ import annotations

import json

from faults.damage import (
    Change,
    all_of,
    cut_in_half,
    edited,
    edited_json,
    edited_tensors,
    emptied,
    removed,
    written,
    zeroed,
)
from faults.harness import ANY, Either, Ending, Fault, OneLine, Survived

BIG = "policy/model.safetensors"
HEADER = (2**40).to_bytes(8, "little") + b"{}"


def model(name: str, change: Change, *words: str, ending: Ending | None = None) -> Fault:
    return Fault("model folder", name, ending or OneLine(2, *(words or ("policy",))), prepare=change)


def drop(key: str):
    return lambda values: values.pop(key)


MODELS = [
    model("has no weights", removed(BIG)),
    model("has empty weights", emptied(BIG)),
    model("has half of its weights", cut_in_half(BIG)),
    model("has weights that end in zeros", zeroed(BIG), ending=Either(OneLine(2, "policy"), Survived(like=ANY))),
    model("has weights with a header of a terabyte", written(BIG, HEADER)),
    model(
        "has weights of another shape",
        edited_tensors(BIG, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:3].clone()})),
    ),
    model("has a tensor too few", edited_tensors(BIG, drop("model.norm.weight"))),
    model(
        "has a tensor too many",
        edited_tensors(BIG, lambda t: t.update(extra=t["model.norm.weight"].clone())),
        ending=Either(OneLine(2, "policy"), Survived(like=ANY)),
    ),
    model("has no config", removed("policy/config.json")),
    model("has a config that is no JSON", written("policy/config.json", "{")),
    model("has a config of no kind", edited_json("policy/config.json", drop("model_type"))),
    model("has a config of an unknown kind", edited_json("policy/config.json", lambda c: c.update(model_type="x"))),
    model("has a config of another size", edited_json("policy/config.json", lambda c: c.update(hidden_size=32))),
    model("has a config with more layers", edited_json("policy/config.json", lambda c: c.update(num_hidden_layers=3))),
    model("has a config with fewer words", edited_json("policy/config.json", lambda c: c.update(vocab_size=7))),
    model(
        "asks for code of its own",
        edited_json(
            "policy/config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
        ),
        "policy",
    ),
    model(
        "has no tokenizer",
        all_of(removed("policy/tokenizer.json"), removed("policy/tokenizer_config.json")),
        "tokenizer",
    ),
    model("has a tokenizer that is no JSON", written("policy/tokenizer.json", "{")),
    model("has half of a tokenizer", cut_in_half("policy/tokenizer.json")),
    model(
        "has a broken chat template",
        written("policy/chat_template.jinja", "{% for m in %}"),
        "template",
        ending=Either(OneLine(2, "template"), Survived(like=ANY)),
    ),
    model(
        "has a generation config that is no JSON",
        written("policy/generation_config.json", "{"),
        "generation_config.json",
    ),
    model(
        "has absurd defaults of generation",
        edited_json("policy/generation_config.json", lambda c: c.update(temperature=-1.0)),
        ending=Either(OneLine(2, "generation"), Survived(like=ANY)),
    ),
    model(
        "has weights that are all zero",
        edited_tensors(BIG, lambda tensors: [tensor.zero_() for tensor in tensors.values()]),
        "policy",
        "zero",
    ),
    model("is a file", all_of(removed("policy"), written("policy", "x"))),
    model("is not there", removed("policy")),
    model(
        "has its weights in a pickle",
        all_of(removed(BIG), written("policy/pytorch_model.bin", b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.")),
        "policy",
    ),
    model(
        "has an index that names no file",
        all_of(
            removed(BIG),
            written(
                "policy/model.safetensors.index.json",
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}),
            ),
        ),
    ),
    model(
        "is BERT", edited_json("policy/config.json", lambda c: c.update(model_type="bert", architectures=["BertModel"]))
    ),
    model(
        "is a reward model",
        edited_json("policy/config.json", lambda c: c.update(architectures=["LlamaForSequenceClassification"])),
        "policy",
    ),
    Fault(
        "model folder",
        "of the reference is not there",
        OneLine(2, "nowhere"),
        options=dict(ref_model_name_or_path="./nowhere"),
    ),
    Fault(
        "model folder",
        "of the reference has other words",
        OneLine(2, "reference"),
        options=dict(ref_model_name_or_path="./reference"),
        prepare=lambda folder: another_vocabulary(folder),
    ),
    Fault(
        "model folder",
        "of the reward is not there",
        OneLine(2, "nowhere"),
        options=dict(reward_funcs=None, reward_model_path="./nowhere"),
    ),
    Fault(
        "model folder",
        "of the reward is no reward model",
        OneLine(2, "policy"),
        options=dict(reward_funcs=None, reward_model_path="./policy"),
    ),
]


def another_vocabulary(folder) -> None:
    """The same size, with two words changed over."""
    import shutil

    shutil.copytree(folder / "policy", folder / "reference")
    edited(
        "reference/tokenizer.json",
        lambda data: data.replace(b'"w1"', b'"wX"').replace(b'"w2"', b'"w1"').replace(b'"wX"', b'"w2"'),
    )(folder)


FAULTS = MODELS
