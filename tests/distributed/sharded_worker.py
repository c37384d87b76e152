"""Run by torchrun with two processes: log-probabilities and gradients of wrapped models, of other groups on each rank.

Also imported by the test, which makes the same models and groups in one process.
"""

import datetime
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.packing.pack import pack_groups
from support import tiny
from support.single_sequences import weighted

MODELS = ("llama, tied", "qwen2, untied", "gemma2, module head", "llama, LoRA", "llama, LoRA on the head")
WRAPPERS = ("layers and root", "accelerate", "ddp")
CASES = list(itertools.product(MODELS, WRAPPERS, ("plain", "checkpointing")))
COMPLETIONS = (
    [[[5, 6, 7, 1], [8, 9], [8, 9, 30]], [[10, 11, 12, 13, 14, 1], [15, 1]]],
    [[[1], [20, 21, 22], [23]], [[31, 32], [33, 1], [34, 35, 36]], [[37, 38, 39, 40, 1], [24, 25, 26, 27, 28, 29, 1]]],
)
LENGTHS = ((9, 2), (4, 14, 6))


def lora(**options):
    made = get_peft_model(tiny.causal_lm(tie_word_embeddings=False), LoraConfig(r=4, **options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def model(name):
    return {
        "llama, tied": lambda: tiny.causal_lm("llama"),
        "qwen2, untied": lambda: tiny.causal_lm("qwen2", tie_word_embeddings=False),
        "gemma2, module head": lambda: tiny.causal_lm("gemma2"),
        "llama, LoRA": lambda: lora(target_modules=["q_proj", "v_proj"]),
        "llama, LoRA on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    }[name]()


def groups(rank):
    prompts = tiny.prompts(LENGTHS[rank], seed=rank)
    return [tiny.group(prompt, ids) for prompt, ids in zip(prompts, COMPLETIONS[rank], strict=True)]


def wrap(made, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(made)
    if wrapper == "layers and root":
        for layer in unwrapped(made).model.layers:
            fully_shard(layer)
        return fully_shard(made)
    # What accelerate's `prepare` does with a model; its `Accelerator` itself shards on no CPU.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=dist.get_rank() == 0
    )
    return fsdp2_prepare_model(accelerator, made)


def run(name, wrapper, memory):
    made = model(name)
    enable_logprobs(made)
    if memory == "checkpointing":
        tiny.checkpoint_layers(made)
    wrapped = wrap(made.train(), wrapper)
    rows = pack_groups(groups(dist.get_rank()), [], shared=True)
    with torch.no_grad():
        without_gradient = row_logprobs(wrapped, rows).token_logps_M
    got = row_logprobs(wrapped, rows)
    weighted(got.token_logps_M).backward()
    grads = {n.removeprefix("module."): p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    return {
        "logps": got.token_logps_M.detach(),
        "entropy": got.entropy_M,
        "without gradient": without_gradient,
        "gradient": {n: g if wrapper == "ddp" else g.full_tensor() for n, g in grads.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    results = {case: run(*case) for case in CASES}
    torch.save(results, Path(sys.argv[1]) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()
