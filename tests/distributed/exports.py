"""What is sent to vLLM of models that are sharded as the policy of a trainer is; called on every rank together."""

import gc
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from online_dpo.distributed.collectives import is_first_rank
from online_dpo.distributed.weights import is_sharded
from online_dpo.rollout.weights.adapter import write_adapter
from online_dpo.rollout.weights.export import streamed, write_weights
from support import tiny

LORA = dict(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
MOE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def adapted(model, **fields):
    return get_peft_model(model, LoraConfig(**{**LORA, **fields}))


def experts():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=tiny.VOCABULARY, num_local_experts=4, **MOE))


MODELS = {
    "full": lambda: tiny.causal_lm("llama"),
    "tied": lambda: tiny.causal_lm("qwen2", tie_word_embeddings=True),
    "transposed": lambda: adapted(tiny.causal_lm("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True),
    "lora": lambda: adapted(tiny.causal_lm("llama")),
    "biases": lambda: adapted(tiny.causal_lm("qwen2"), bias="all"),
    "saved modules": lambda: adapted(tiny.causal_lm("llama", tie_word_embeddings=False), modules_to_save=["lm_head"]),
    "embedding": lambda: adapted(
        tiny.causal_lm("qwen2", tie_word_embeddings=False), target_modules=["embed_tokens", "lm_head"]
    ),
    "experts": experts,
}


def kept(model):
    """All weights under their names."""
    with streamed(model) as stream:
        return {name: tensor.detach().clone() for name, tensor in stream}


def live_bytes():
    """The size of all tensors of this process."""
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def most_bytes(model):
    """The most memory that a consumer needs who throws every weight away, and the size of all weights."""
    gc.collect()
    before, most, size = live_bytes(), 0, 0
    with streamed(model) as stream:
        for number, (_, tensor) in enumerate(stream):
            size += tensor.nbytes
            most = max(most, live_bytes() - before) if number % 5 == 0 else most
    return most, size


def written(model):
    """What the first rank has written; the others write nothing."""
    with TemporaryDirectory() as folder:
        write_weights(model, Path(folder) if is_first_rank() else None)
        return {name: t for file in Path(folder).iterdir() for name, t in load_file(file).items()}


def adapter(model):
    with TemporaryDirectory() as folder:
        write_adapter(model, Path(folder) if is_first_rank() else None)
        return load_file(Path(folder) / "adapter_model.safetensors") if is_first_rank() else {}


def stopped_early(model):
    """The first rank's consumer fails at the second weight, within a generator that closes what it reads."""

    def passed_on(stream):
        yield from stream

    try:
        with streamed(model) as stream:
            own = passed_on(stream)
            for number, _ in enumerate(own):
                if number == 1 and is_first_rank():
                    own.close()
                    raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    return kept(model)


def exports(sharding):
    """For each model what is sent of it whole and sharded."""
    found = {}
    for name, make in MODELS.items():
        model = make().eval()
        expected = kept(model)
        own = adapter(model) if name == "lora" else None
        sharding.shard_frozen(model)
        found[name] = {"expected": expected, "weights": kept(model), "written": written(model)}
        found[name]["sharded"] = is_sharded(model)
        if name in ("full", "experts"):
            found[name]["bytes"] = most_bytes(model)
        if name == "lora":
            found[name] |= {"adapter": (adapter(model), own), "stopped": stopped_early(model)}
    return found
