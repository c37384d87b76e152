"""Model folders of every kind that are damaged, hostile or of the wrong kind: policy, reference, reward model, judge,
adapter, tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.damage import Change, all_of, cut_in_half, edited, edited_json, edited_tensors, emptied, removed, written
from faults.harness import ANY, Either, Ending, Fault, OneLine, Survived
from support import tiny

WEIGHTS = "model.safetensors"
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


# ---- folders


def copy_of_policy(name: str) -> Change:
    return lambda folder: shutil.copytree(folder / "policy", folder / name) and None


def reward_model(name: str = "reward", **fields: Any) -> Change:
    """The folder of a reward model with random weights."""

    def make(folder: Path) -> None:
        import torch
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(3)
        config = tiny.config("llama", **{**SMALL, "num_labels": 1, **fields})
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        tiny.tokenizer(chat=True).save_pretrained(folder / name)

    return make


def adapter(name: str = "adapter", base: str = "policy") -> Change:
    """The folder of a LoRA adapter for ``base``, with its tokenizer."""

    def make(folder: Path) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(4)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        model.peft_config["default"].base_model_name_or_path = base
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder / name)
        tiny.tokenizer(chat=True).save_pretrained(folder / name)

    return make


POLICY: dict[str, Any] = {}
REFERENCE: dict[str, Any] = dict(ref_model_name_or_path="./reference")
REWARD: dict[str, Any] = dict(reward_funcs=None, reward_model_path="./reward")
JUDGE: dict[str, Any] = dict(reward_funcs=None, judge="./judge")
ADAPTER: dict[str, Any] = dict(model_name_or_path="./adapter")
ROLES: dict[str, tuple[dict[str, Any], Change]] = {
    "policy": (POLICY, lambda folder: None),
    "reference": (REFERENCE, copy_of_policy("reference")),
    "reward": (REWARD, reward_model()),
    "judge": (JUDGE, reward_model("judge")),
    "adapter": (ADAPTER, adapter()),
}


def of(
    role: str,
    name: str,
    change: Callable[[str], Change],
    *words: str,
    ending: Ending | None = None,
    quick: bool = True,
    **options: Any,
) -> Fault:
    """A fault of the folder with this role; ``change`` gets its name. The short list has those of policies and adapters
    that end in a line; the others are the same code."""
    own, make = ROLES[role]
    return Fault(
        "models",
        f"{role} {name}",
        ending or OneLine(2, *(words or (role,))),
        options={**own, **options},
        prepare=all_of(make, change(role)),
        quick=quick and role in ("policy", "adapter") and (ending is None or isinstance(ending, OneLine)),
    )


# ---- damage


def tensors(edit: Callable[[dict], object], file: str = WEIGHTS) -> Callable[[str], Change]:
    return lambda role: edited_tensors(f"{role}/{file}", edit)


def config(edit: Callable[[dict], object], file: str = "config.json") -> Callable[[str], Change]:
    return lambda role: edited_json(f"{role}/{file}", edit)


def text(file: str, data: str | bytes) -> Callable[[str], Change]:
    return lambda role: written(f"{role}/{file}", data)


def no(*files: str) -> Callable[[str], Change]:
    return lambda role: all_of(*(removed(f"{role}/{file}") for file in files))


def header(edit: Callable[[dict], object]) -> Callable[[str], Change]:
    """The header of the weights is another; the data stay."""

    def change(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        values = json.loads(data[8 : 8 + size])
        edit(values)
        text = json.dumps(values).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return lambda role: edited(f"{role}/{WEIGHTS}", change)


def first_matrix(values: dict, part: str = "mlp.up_proj") -> str:
    return next(name for name in values if part in name)


def replace_tensor(make: Callable[[Any], Any], part: str = "mlp.up_proj") -> Callable[[dict], object]:
    return lambda t: t.update({(name := first_matrix(t, part)): make(t[name]).contiguous()})


def with_nan(tensor: Any) -> Any:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


def as_int8(tensor: Any) -> Any:
    import torch

    return tensor.to(torch.int8)


def as_fp8(tensor: Any) -> Any:
    import torch

    return tensor.to(torch.float8_e4m3fn)


def overlapping(values: dict) -> None:
    names = [name for name in values if name != "__metadata__"]
    values[names[1]]["data_offsets"] = values[names[0]]["data_offsets"]


def sharded(without: str | None = None, names: str | None = None) -> Callable[[str], Change]:
    """The weights are in two files with an index; ``without`` this tensor, or its name stands for another file."""

    def make(role: str) -> Change:
        def change(folder: Path) -> None:
            from safetensors.torch import load_file, save_file

            path = folder / role / WEIGHTS
            all_tensors = load_file(path)
            path.unlink()
            files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
            index = {name: files[i % 2] for i, name in enumerate(all_tensors)}
            for file in files:
                kept = {n: t for n, t in all_tensors.items() if index[n] == file and n != without}
                save_file(kept, folder / role / file, metadata={"format": "pt"})
            if names:
                index[next(iter(index))] = names
            (folder / role / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
            )

        return change

    return make


EVIL = "import pathlib\npathlib.Path('owned').touch()\nclass Model: pass\nclass Config: pass\n"
PICKLE = b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR."

WHOLE = {"policy", "reference", "reward", "judge"}
TENSORS: list[Fault] = []
for role in ("policy", "reference", "reward", "judge", "adapter"):
    weights = "adapter_model.safetensors" if role == "adapter" else WEIGHTS
    part = "lora_B" if role == "adapter" else "mlp.up_proj"
    TENSORS += [
        of(
            role,
            "with a matrix of zeros",
            tensors(replace_tensor(lambda t: t * 0, part), weights),
            ending=Survived("are zeros", like=ANY) if role == "adapter" else None,
        ),
        of(role, "with NaN in a tensor", tensors(replace_tensor(with_nan, part), weights)),
        of(role, "without one tensor", tensors(lambda t, part=part: t.pop(first_matrix(t, part)), weights)),
        of(
            role,
            "with an unknown tensor",
            tensors(lambda t, part=part: t.update({"other.weight": t[first_matrix(t, part)].clone()}), weights),
            ending=Survived("ignored: `other.weight`", like=None if role == "policy" else ANY),
        ),
        of(role, "with a tensor of another shape", tensors(replace_tensor(lambda t: t[:1], part), weights)),
        of(role, "with a tensor of int8", tensors(replace_tensor(as_int8, part), weights)),
        of(role, "with a tensor of fp8", tensors(replace_tensor(as_fp8, part), weights)),
        of(role, "with empty weights", lambda r, w=weights: emptied(f"{r}/{w}")),
        of(role, "with half of its weights", lambda r, w=weights: cut_in_half(f"{r}/{w}")),
        of(role, "with no weights", no(weights)),
        of(role, "with weights that are a web page", text(weights, "<html>404</html>")),
        of(
            role,
            "with weights that are a git-lfs pointer",
            text(weights, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"),
        ),
    ]
for role in ("policy", "reward", "judge", "reference"):
    TENSORS += [
        of(role, "with a header that is no JSON", text(WEIGHTS, struct.pack("<Q", 4) + b"{abc" + b"0" * 99)),
        of(role, "with offsets that overlap", header(overlapping)),
        of(
            role,
            "with shapes that do not fit its offsets",
            header(lambda v: v[list(v)[1]].update(shape=[10**12, 10**9])),
        ),
        of(role, "with a shard missing", sharded(names="model-00003-of-00002.safetensors")),
        of(role, "with a shard without a tensor", sharded(without="model.layers.0.mlp.up_proj.weight")),
        of(role, "with shards", sharded(), ending=Survived(like={**ROLES[role][0]} if role == "policy" else ANY)),
        of(role, "with an index that leaves the folder", sharded(names="../data.jsonl")),
        of(
            role,
            "with an index that is no JSON",
            lambda r: all_of(removed(f"{r}/{WEIGHTS}"), written(f"{r}/model.safetensors.index.json", "{")),
        ),
        of(
            role,
            "with a pickle alone",
            lambda r: all_of(removed(f"{r}/{WEIGHTS}"), written(f"{r}/pytorch_model.bin", PICKLE)),
        ),
    ]

CONFIGS: list[Fault] = []
for role in ("policy", "reference", "reward", "judge"):
    CONFIGS += [
        of(role, "without config", no("config.json")),
        of(role, "with an empty config", text("config.json", "")),
        of(role, "with a config that is a list", text("config.json", "[]")),
        of(role, "with a config that is no UTF-8", text("config.json", b'{"a": "\xff"}')),
        of(role, "with a config of 20000 levels", text("config.json", '{"a": ' + "[" * 20000 + "]" * 20000 + "}")),
        of(role, "with a vocabulary of a trillion", config(lambda c: c.update(vocab_size=10**12))),
        of(role, "with a billion layers", config(lambda c: c.update(num_hidden_layers=10**9))),
        of(role, "with no layers", config(lambda c: c.update(num_hidden_layers=0))),
        of(role, "with minus one layer", config(lambda c: c.update(num_hidden_layers=-1))),
        of(role, "with a hidden size that is text", config(lambda c: c.update(hidden_size="16"))),
        of(role, "with no heads", config(lambda c: c.update(num_attention_heads=0))),
        of(role, "with an unknown activation", config(lambda c: c.update(hidden_act="nope"))),
        of(role, "of an unknown type", config(lambda c: c.update(model_type="nope"))),
        of(role, "of no type", config(lambda c: c.pop("model_type"))),
        of(role, "with a type that is a list", config(lambda c: c.update(model_type=[1]))),
        of(role, "with an odd dtype", config(lambda c: (c.pop("torch_dtype", 0), c.update(dtype="float99")))),
        of(
            role,
            "with code of its own",
            lambda r: all_of(
                written(f"{r}/evil.py", EVIL),
                edited_json(
                    f"{r}/config.json",
                    lambda c: c.update(
                        model_type="evil",
                        auto_map={
                            "AutoConfig": "evil.Config",
                            "AutoModelForCausalLM": "evil.Model",
                            "AutoModelForSequenceClassification": "evil.Model",
                        },
                    ),
                ),
            ),
        ),
        of(
            role,
            "with code of its own beside a known type",
            lambda r: all_of(
                written(f"{r}/evil.py", EVIL),
                edited_json(
                    f"{r}/config.json",
                    lambda c: c.update(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
                ),
            ),
            ending=Either(Survived(like=ANY), OneLine(2, role)),
        ),
        of(role, "with fewer words than its tensors", config(lambda c: c.update(vocab_size=20))),
        of(
            role,
            "with room for four tokens",
            config(lambda c: c.update(max_position_embeddings=4)),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with a pad token that it does not know",
            config(lambda c: c.update(pad_token_id=4000)),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with an end token that it does not know",
            config(lambda c: c.update(eos_token_id=4000)),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with quantisation that is not there",
            config(lambda c: c.update(quantization_config={"quant_method": "nope"})),
        ),
        of(
            role,
            "with attention that is not there",
            config(lambda c: c.update(attn_implementation="nope")),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with rope of no kind",
            config(lambda c: c.update(rope_parameters={"rope_type": "nope", "rope_theta": 1.0})),
        ),
        of(role, "with norms of NaN", config(lambda c: c.update(rms_norm_eps=float("nan")))),
        of(role, "that is a file", lambda r: all_of(removed(r), written(r, "x"))),
        of(role, "that is an empty folder", lambda r: all_of(removed(r), lambda folder: (folder / r).mkdir())),
        of(role, "that is a loop of links", lambda r: all_of(removed(r), lambda folder: os.symlink(r, folder / r))),
        of(role, "that is not there", removed),
        of(
            role,
            "that points to nothing",
            lambda r: all_of(removed(r), lambda folder: os.symlink("nowhere", folder / r)),
        ),
    ]

TOKENIZERS: list[Fault] = []
for role in ("policy", "reward", "judge"):
    TOKENIZERS += [
        of(role, "without tokenizer", no("tokenizer.json", "tokenizer_config.json")),
        of(role, "without tokenizer.json", no("tokenizer.json")),
        of(
            role,
            "without tokenizer_config.json",
            no("tokenizer_config.json"),
            ending=Either(OneLine(2, "token"), Survived(like=ANY)),
        ),
        of(role, "with a tokenizer of nothing", text("tokenizer.json", "{}")),
        of(role, "with half of a tokenizer", lambda r: cut_in_half(f"{r}/tokenizer.json")),
        of(role, "with an empty tokenizer", lambda r: emptied(f"{r}/tokenizer.json")),
        of(role, "with a tokenizer_config that is no JSON", text("tokenizer_config.json", "{")),
        of(
            role,
            "with a tokenizer class of no kind",
            config(lambda c: c.update(tokenizer_class="NopeTokenizer"), "tokenizer_config.json"),
            ending=Either(OneLine(2, "token"), Survived(like=ANY)),
        ),
        of(
            role,
            "with code in its tokenizer",
            lambda r: all_of(
                written(f"{r}/evil.py", EVIL),
                edited_json(
                    f"{r}/tokenizer_config.json",
                    lambda c: c.update(
                        tokenizer_class="Model", auto_map={"AutoTokenizer": ["evil.Model", "evil.Model"]}
                    ),
                ),
            ),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "without end token",
            config(lambda c: c.update(eos_token=None), "tokenizer_config.json"),
            ending=Either(OneLine(2, "token"), Survived(like=ANY)),
        ),
        of(
            role,
            "without padding token",
            config(lambda c: c.update(pad_token=None), "tokenizer_config.json"),
            ending=Either(OneLine(2, "token"), Survived(like=ANY)),
        ),
        of(
            role,
            "with padding by its end",
            config(lambda c: c.update(pad_token="<eos>"), "tokenizer_config.json"),
            ending=Survived(like=ANY),
        ),
        of(
            role,
            "with a tokenizer that is larger",
            lambda r: edited_json(
                f"{r}/tokenizer.json", lambda t: t["model"]["vocab"].update({f"w{i}": i + 4 for i in range(39, 90)})
            ),
            ending=Either(OneLine(2, "token"), Survived(like=ANY)),
        ),
        of(
            role,
            "with an end token that is new",
            lambda r: edited_json(f"{r}/tokenizer_config.json", lambda c: c.update(eos_token="<new>")),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with a model_max_length of 3",
            config(lambda c: c.update(model_max_length=3), "tokenizer_config.json"),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with a negative model_max_length",
            config(lambda c: c.update(model_max_length=-3), "tokenizer_config.json"),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(
            role,
            "with a model_max_length that is text",
            config(lambda c: c.update(model_max_length="many"), "tokenizer_config.json"),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
    ]

CHAT = "".join(json.dumps({"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]}) + "\n" for i in range(8))
TEMPLATES: dict[str, str] = {
    "that is broken": "{% for m in %}",
    "without an end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "that takes all memory": "{% set ns = namespace(s='x') %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "that multiplies a text": "{{ 'x' * 10**11 }}",
    "that computes a power": "{{ 9 ** (9 ** 9) }}",
    "that pads a text": "{{ '%099999999999d' % 1 }}",
    "that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "that looks into objects": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "that runs a command": "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "that ignores the messages": "w1 w2 w3",
    "that gives nothing": "",
    "that raises": "{{ raise_exception('no') }}",
    "that includes a file": "{% include '/etc/passwd' %}",
    "that is nested deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
for role in ("policy", "reward"):
    for name, template in TEMPLATES.items():
        TOKENIZERS.append(
            of(role, f"with a template {name}", text("chat_template.jinja", template), "template").but(
                files={"data.jsonl": CHAT}
            )
        )
    TOKENIZERS.append(
        of(role, "with no template", no("chat_template.jinja"), "template").but(files={"data.jsonl": CHAT})
    )

GENERATION = "generation_config.json"
KINDS: list[Fault] = [
    of(
        "policy",
        "with sampling of its own",
        config(lambda c: c.update(temperature=0.01, top_k=1, do_sample=False, repetition_penalty=9.0), GENERATION),
        ending=Survived(),
    ),
    of(
        "policy",
        "with an end of generation that it does not know",
        config(lambda c: c.update(eos_token_id=4000), GENERATION),
        ending=Either(OneLine(2, "end"), Survived(like=ANY)),
    ),
    of(
        "policy", "with an end of generation that is text", config(lambda c: c.update(eos_token_id="<eos>"), GENERATION)
    ),
    of("policy", "with a generation config that is a list", text(GENERATION, "[]")),
    of("policy", "with a generation config that is empty", text(GENERATION, "")),
    of("policy", "with a max_length of 1", config(lambda c: c.update(max_length=1), GENERATION), ending=Survived()),
    of(
        "policy",
        "with a temperature that is text",
        config(lambda c: c.update(temperature="hot"), GENERATION),
        ending=Either(OneLine(2, "policy"), Survived(like=ANY)),
    ),
    of(
        "policy",
        "with beams",
        config(lambda c: c.update(num_beams=4, early_stopping=True), GENERATION),
        ending=Survived(),
    ),
    of(
        "policy",
        "with a constraint in generation",
        config(lambda c: c.update(suppress_tokens=[4000], bad_words_ids=[[9999]]), GENERATION),
        ending=Either(OneLine(2, "policy"), Survived(like=ANY)),
    ),
    of("policy", "untied without a head", config(lambda c: c.update(tie_word_embeddings=False))),
]


def kind_of_model(make: Callable[[], Any], tokenizer: bool = True) -> Callable[[str], Change]:
    def change(role: str) -> Change:
        def write(folder: Path) -> None:
            import torch

            torch.manual_seed(5)
            shutil.rmtree(folder / role)
            make().save_pretrained(folder / role)
            if tokenizer:
                tiny.tokenizer(chat=True).save_pretrained(folder / role)

        return write

    return change


def bert(head: str = "BertForMaskedLM", **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=44)
        return getattr(transformers, head)(
            transformers.BertConfig(**{**shape, "max_position_embeddings": 64, **fields})
        )

    return make


def of_transformers(config: str, model: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**fields))

    return make


T5 = of_transformers(
    "T5Config",
    "T5ForConditionalGeneration",
    d_model=16,
    d_kv=8,
    d_ff=16,
    num_layers=1,
    num_heads=2,
    vocab_size=44,
    decoder_start_token_id=0,
)
VIT = of_transformers(
    "ViTConfig",
    "ViTForImageClassification",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
)
BARE = of_transformers(
    "LlamaConfig",
    "LlamaModel",
    vocab_size=44,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
    **SMALL,
)
CAUSAL = of_transformers(
    "LlamaConfig",
    "LlamaForCausalLM",
    vocab_size=44,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
    **SMALL,
)
LLAMA_REWARD = of_transformers(
    "LlamaConfig",
    "LlamaForSequenceClassification",
    vocab_size=44,
    max_position_embeddings=128,
    num_labels=1,
    pad_token_id=0,
    eos_token_id=1,
    **SMALL,
)
TIED_REWARD = of_transformers(
    "LlamaConfig",
    "LlamaForSequenceClassification",
    vocab_size=44,
    max_position_embeddings=128,
    num_labels=1,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
    **SMALL,
)
TOKENS = of_transformers(
    "LlamaConfig",
    "LlamaForTokenClassification",
    vocab_size=44,
    max_position_embeddings=128,
    num_labels=1,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
    **SMALL,
)
for role in ("policy", "reference"):
    KINDS += [
        of(role, "that is BERT", kind_of_model(bert())),
        of(role, "that is an embedding model", kind_of_model(bert("BertModel"))),
        of(
            role,
            "that is a BERT decoder",
            kind_of_model(bert("BertLMHeadModel", is_decoder=True)),
            ending=Either(OneLine(2, role), Survived(like=ANY)),
        ),
        of(role, "that is T5", kind_of_model(T5)),
        of(role, "that is a vision model", kind_of_model(VIT)),
        of(role, "that has no head", kind_of_model(BARE)),
        of(role, "that is a reward model", kind_of_model(LLAMA_REWARD)),
        of(role, "that is a tied reward model", kind_of_model(TIED_REWARD)),
        of(role, "that classifies tokens", kind_of_model(TOKENS)),
        of(role, "that names another architecture", config(lambda c: c.update(architectures=["GPT2LMHeadModel"]))),
        of(
            role,
            "that names no architecture",
            config(lambda c: c.update(architectures=None)),
            ending=Survived(like=ANY),
        ),
        of(
            role,
            "that names an architecture of nobody",
            config(lambda c: c.update(architectures=["NopeForCausalLM"])),
            ending=Survived(like=ANY),
        ),
    ]


def reward(
    name: str, make: Callable[[], Any] | Change, *words: str, ending: Ending | None = None, role: str = "reward"
) -> Fault:
    return of(role, name, kind_of_model(make), *words, ending=ending)


KINDS += [
    of("reward", "that is a causal model", kind_of_model(CAUSAL)),
    of("reward", "that has no head", kind_of_model(BARE)),
    of("reward", "that classifies tokens", kind_of_model(TOKENS)),
    of("reward", "with two labels", kind_of_model(lambda: bert("BertForSequenceClassification", num_labels=2)())),
    of(
        "reward",
        "of regression in name with two labels",
        kind_of_model(lambda: bert("BertForSequenceClassification", num_labels=2, problem_type="regression")()),
    ),
    of(
        "reward",
        "that is toxic",
        kind_of_model(
            lambda: bert("BertForSequenceClassification", num_labels=1, id2label={0: "toxic"}, label2id={"toxic": 0})()
        ),
        ending=Survived(like=ANY),
    ),
    of(
        "reward",
        "with many labels named",
        config(lambda c: c.update(id2label={"0": "neg", "1": "pos"}, label2id={"neg": 0, "pos": 1})),
    ),
    of(
        "reward",
        "with num_labels 2 and one row",
        config(lambda c: (c.pop("id2label", 0), c.pop("label2id", 0), c.update(num_labels=2))),
    ),
    of("reward", "of multi-label kind", config(lambda c: c.update(problem_type="multi_label_classification"))),
    of("reward", "of one class", config(lambda c: c.update(problem_type="single_label_classification"))),
    of("reward", "with a head of zeros", tensors(replace_tensor(lambda t: t * 0, "score"))),
    of(
        "reward",
        "that is BERT",
        kind_of_model(lambda: bert("BertForSequenceClassification", num_labels=1)()),
        ending=Survived(like=ANY),
    ),
    of(
        "reward",
        "that is BERT with room for 5",
        kind_of_model(lambda: bert("BertForSequenceClassification", num_labels=1, max_position_embeddings=5)()),
        ending=Either(OneLine(2, "reward"), Survived("cut", like=ANY)),
    ),
    of("reward", "that is T5", kind_of_model(T5)),
    of("reward", "that is a vision model", kind_of_model(VIT)),
    of(
        "judge",
        "that is a causal model with zeros",
        kind_of_model(CAUSAL),
        ending=Either(OneLine(2, "judge"), Survived(like=ANY)),
    ),
    of("judge", "that is T5", kind_of_model(T5)),
    of("judge", "that is BERT without a head", kind_of_model(bert("BertModel"))),
    of("judge", "with three labels", kind_of_model(lambda: bert("BertForSequenceClassification", num_labels=3)())),
    of(
        "reference",
        "of a larger vocabulary",
        kind_of_model(
            of_transformers("LlamaConfig", "LlamaForCausalLM", vocab_size=90, max_position_embeddings=128, **SMALL)
        ),
        ending=Survived(like=ANY),
    ),
    of(
        "reference",
        "of a smaller vocabulary",
        kind_of_model(
            of_transformers("LlamaConfig", "LlamaForCausalLM", vocab_size=30, max_position_embeddings=128, **SMALL)
        ),
    ),
    of("reference", "without a tokenizer", no("tokenizer.json", "tokenizer_config.json"), ending=Survived(like=ANY)),
    of(
        "reference",
        "with other words",
        lambda r: edited(
            f"{r}/tokenizer.json",
            lambda d: d.replace(b'"w1"', b'"wX"').replace(b'"w2"', b'"w1"').replace(b'"wX"', b'"w2"'),
        ),
    ),
    of(
        "reference",
        "with other special tokens",
        config(lambda c: c.update(eos_token="<end>"), "tokenizer_config.json"),
        ending=Survived(like=ANY),
    ),
    of(
        "reference", "of another architecture", kind_of_model(lambda: tiny.causal_lm("gpt2")), ending=Survived(like=ANY)
    ),
    of("reference", "that is the policy", lambda r: lambda folder: None, ending=Survived(like={})),
    of(
        "reference",
        "that is the policy's folder",
        lambda r: lambda folder: None,
        ending=Survived(like={}),
        ref_model_name_or_path="./policy",
    ),
    of(
        "reference",
        "with a broken tokenizer",
        lambda r: cut_in_half(f"{r}/tokenizer.json"),
        ending=Either(OneLine(2, "reference"), Survived(like=ANY)),
    ),
]

NAMES: list[Fault] = []
for name, options in {
    "policy": dict(),
    "reference": dict(),
    "reward": dict(reward_funcs=None),
    "judge": dict(reward_funcs=None),
}.items():
    field = {
        "policy": "model_name_or_path",
        "reference": "ref_model_name_or_path",
        "reward": "reward_model_path",
        "judge": "judge",
    }[name]
    for what, value in {
        "with a typo and a dot": "./polcy",
        "with a typo": "polcy",
        "of an organisation that is not there": "nobody/none",
        "of the hub with a blank": "no body/none",
        "with a revision": "nobody/none@main",
        "that is a URL": "https://huggingface.co/nobody/none",
        "with two dots": "a..b/c",
        "with many slashes": "a/b/c/d",
        "that is a number": "1234",
        "that is a file": "data.jsonl",
        "that is a weights file": "policy/model.safetensors",
    }.items():
        NAMES.append(
            Fault(
                "models",
                f"{name} name {what}",
                OneLine(2, value),
                options={**options, field: value},
                quick=name == "policy",
            )
        )
NAMES += [
    Fault(
        "models",
        "a revision that is not there",
        OneLine(2, "nobody/none"),
        options=dict(model_name_or_path="nobody/none", model_init_kwargs=dict(revision="v9")),
    ),
    Fault("models", "a revision of a folder", Survived(like=ANY), options=dict(model_init_kwargs=dict(revision="v9"))),
    Fault("models", "dtype int8", OneLine(2, "dtype"), options=dict(model_init_kwargs=dict(dtype="int8"))),
    Fault("models", "dtype fp8", OneLine(2, "dtype"), options=dict(model_init_kwargs=dict(dtype="float8_e4m3fn"))),
    Fault(
        "models",
        "an argument of loading that is not there",
        OneLine(2, "nope"),
        options=dict(model_init_kwargs=dict(nope=1)),
    ),
    Fault(
        "models",
        "shapes that may differ",
        OneLine(2, "policy"),
        options=dict(model_init_kwargs=dict(ignore_mismatched_sizes=True)),
        prepare=edited_json("policy/config.json", lambda c: c.update(vocab_size=50)),
    ),
    Fault(
        "models",
        "layers given on loading",
        OneLine(2, "policy"),
        options=dict(model_init_kwargs=dict(num_hidden_layers=2)),
    ),
    Fault(
        "models",
        "weights that are pickled allowed",
        OneLine(2, "policy"),
        options=dict(model_init_kwargs=dict(use_safetensors=False)),
    ),
    Fault(
        "models",
        "weights_only off",
        OneLine(2, "weights_only"),
        options=dict(model_init_kwargs=dict(weights_only=False)),
        prepare=all_of(removed(f"policy/{WEIGHTS}"), written("policy/pytorch_model.bin", PICKLE)),
    ),
    Fault(
        "models",
        "device_map off to nowhere",
        OneLine(2, "device_map"),
        options=dict(model_init_kwargs=dict(device_map="nowhere")),
    ),
    Fault(
        "models",
        "a name with no network",
        OneLine(2, "nobody/none"),
        options=dict(model_name_or_path="nobody/none"),
        environment={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    ),
]

ADAPTERS = [
    of("adapter", "as it should be", lambda r: lambda folder: None, ending=Survived(like=ANY)),
    of(
        "adapter",
        "whose base is not there",
        config(lambda c: c.update(base_model_name_or_path="./nowhere"), "adapter_config.json"),
    ),
    of(
        "adapter",
        "whose base is not named",
        config(lambda c: c.update(base_model_name_or_path=None), "adapter_config.json"),
    ),
    of(
        "adapter",
        "whose base is a name of the hub",
        config(lambda c: c.update(base_model_name_or_path="nobody/none"), "adapter_config.json"),
    ),
    of("adapter", "with a config that is no JSON", text("adapter_config.json", "{")),
    of("adapter", "with a config that is empty", text("adapter_config.json", "")),
    of("adapter", "with a config that is a list", text("adapter_config.json", "[]")),
    of("adapter", "of an unknown type", config(lambda c: c.update(peft_type="NOPE"), "adapter_config.json")),
    of("adapter", "of no type", config(lambda c: c.pop("peft_type"), "adapter_config.json")),
    of("adapter", "of rank 0", config(lambda c: c.update(r=0), "adapter_config.json")),
    of("adapter", "of another rank", config(lambda c: c.update(r=4), "adapter_config.json")),
    of("adapter", "of other modules", config(lambda c: c.update(target_modules=["nope"]), "adapter_config.json")),
    of(
        "adapter",
        "of more modules",
        config(lambda c: c.update(target_modules=["q_proj", "v_proj", "up_proj"]), "adapter_config.json"),
    ),
    of("adapter", "of fewer modules", config(lambda c: c.update(target_modules=["q_proj"]), "adapter_config.json")),
    of("adapter", "of another task", config(lambda c: c.update(task_type="SEQ_CLS"), "adapter_config.json")),
    of(
        "adapter",
        "of a later peft",
        config(lambda c: c.update(new_field=1), "adapter_config.json"),
        ending=Survived(like=ANY),
    ),
    of(
        "adapter",
        "in a pickle",
        lambda r: all_of(removed(f"{r}/adapter_model.safetensors"), written(f"{r}/adapter_model.bin", PICKLE)),
    ),
    of(
        "adapter",
        "whose base is an adapter",
        config(lambda c: c.update(base_model_name_or_path="./adapter"), "adapter_config.json"),
    ),
    of("adapter", "for a base of another shape", lambda r: kind_of_model(lambda: tiny.causal_lm("llama"))("policy")),
    of("adapter", "without tokenizer", no("tokenizer.json", "tokenizer_config.json")),
    of(
        "adapter",
        "as the reference",
        lambda r: lambda folder: None,
        ending=Either(Survived(like=ANY), OneLine(2, "adapter")),
        model_name_or_path="./policy",
        ref_model_name_or_path="./adapter",
    ),
    of(
        "adapter",
        "for a causal model as the reward",
        lambda r: lambda folder: None,
        model_name_or_path="./policy",
        reward_funcs=None,
        reward_model_path="./adapter",
    ),
]

FAULTS = [*TENSORS, *CONFIGS, *TOKENIZERS, *KINDS, *NAMES, *ADAPTERS]
