"""Run by torchrun with two processes: the bytes that each rank holds at the second optimizer step, in every mode.

Also imported by the test, which asks the formula about the same models.

python sizing_worker.py FILE WAY ...
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from sharding_worker import LENGTHS, ways
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support import tiny
from support.training import dataset, trainer

MODELS = {
    "tied": lambda: tiny.causal_lm("llama", vocab_size=tiny.VOCABULARY + 1),  # rows that two ranks cannot share equally
    "untied": lambda: tiny.causal_lm("llama", tie_word_embeddings=False, hidden_size=64),
}
RANK = 4


def own_part(tensor):
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def memory(tensors):
    """Bytes by address, so that shared memory counts once. Counters of steps, which have no dimension, do not count."""
    storages = [own_part(tensor).untyped_storage() for tensor in tensors if tensor.dim()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def tensors_in(kept):
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict):
        yield from (tensor for value in kept.values() for tensor in tensors_in(value))
    elif isinstance(kept, (list, tuple)):
        yield from (tensor for value in kept for tensor in tensors_in(value))


class Count(TrainerCallback):
    """Counts at the second optimizer step: what Adam holds is there since the first."""

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 0:
            return
        parameters = list(model.parameters())
        engine = getattr(self.of.model_wrapped, "optimizer", None)
        adam = optimizer if engine is None else engine.optimizer
        weights = memory(parameters)
        stepped = [p for group in adam.param_groups for p in group["params"]]
        stepped += getattr(engine, "fp32_partitioned_groups_flat", [])  # ZeRO-3 hands Adam one of them at a time
        kept = memory([*tensors_in(list(adam.state.values())), *stepped])
        gradients = [p.grad for p in parameters if p.grad is not None] if engine is None else engine.averaged_gradients
        reference = self.of.reference.model
        self.bytes = {
            "weights": sum(weights.values()),
            "optimizer": sum(size for address, size in kept.items() if address not in weights),
            "gradients": sum(memory(tensors_in(gradients)).values()),
            **({} if reference is None else {"reference": sum(memory(reference.parameters()).values())}),
        }


def counted(way, kind, adapter, bf16):
    count = Count()
    model = MODELS[kind]()
    peft_config = None
    if adapter:
        model = model.to(torch.bfloat16 if bf16 else torch.float32)
        peft_config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        count.of = trainer(
            Path(folder),
            model,
            train_dataset=dataset(lengths=LENGTHS * 2),
            kwargs={"callbacks": [count], "peft_config": peft_config},
            max_steps=2,
            bf16=bf16,
            optim="adamw_torch",
            **ways(way),
        )
        count.of.train()
    return count.bytes


CASES = [("tied", False, True), ("untied", False, False), ("untied", False, True), ("untied", True, True)]
"""A model, whether an adapter is trained, and whether in bf16."""


def main():
    torch.set_num_threads(1)
    found = {}
    for way in sys.argv[2:]:
        for case in CASES:
            found[" ".join(map(str, (way, *case)))] = counted(way, *case)
        AcceleratorState._reset_state(reset_partial_state=True)  # the next way is of another kind
        unset_hf_deepspeed_config()
    Path(f"{sys.argv[1]}-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
