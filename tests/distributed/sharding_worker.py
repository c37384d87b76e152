"""Run by torchrun with two processes (and by plain Python with one): trains in one way of sharding, many times."""

import copy
import itertools
import os
import sys
import traceback
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from exports import exports
from peft import LoraConfig
from transformers import TrainerCallback

from online_dpo.distributed import sampling
from online_dpo.distributed.weights import full, part
from online_dpo.modeling.introspection import layers_in_bits, unwrapped
from support import quantized, tiny
from support.recorded import TakesRecords
from support.training import LORA, dataset, step_logs, trainer, without_times

WHOLE = ("ddp", "zero1", "zero2")
"""Ways in which each rank holds whole weights."""
LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8)
ZERO = {
    "zero_optimization": {
        "reduce_bucket_size": 2000,
        "allgather_bucket_size": 2000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 0,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
}


def ways(name):
    """The configuration fields of a way of sharding."""
    if name == "fsdp2":
        return {"fsdp": "full_shard"}
    if name.startswith("zero"):
        config = copy.deepcopy(ZERO)
        config["zero_optimization"]["stage"] = int(name[4])
        config["bf16"] = {"enabled": "auto"}
        return {"deepspeed": config}
    return {}


class Watch(TrainerCallback):
    """Keeps the passes of each micro-batch, and what a skipped step changes: weights, optimizer, gradients left."""

    def __init__(self, made):
        self.made, self.passes, self.changed, self.before = made, [], [], None
        get = made.get_batch_samples

        def counted(*args):
            micro_batches, weight = get(*args)
            self.passes += [len(inputs["passes"]) for inputs in micro_batches]
            return micro_batches, weight

        made.get_batch_samples = counted

    def state(self):
        optimizer = self.made.optimizer.optimizer
        held = {f"{i} {k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
        tensors = {k: part(v).clone() for k, v in held.items() if isinstance(v, torch.Tensor)}
        return tensors | {n: part(p).clone() for n, p in self.made.model.named_parameters()}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.state()
        new = [name for name in now if name not in self.before]
        self.changed.append(new + [n for n, v in self.before.items() if not torch.equal(v, now[n])])


def whole_weights(made):
    names = {n.removeprefix("module."): p for n, p in made.model.named_parameters()}
    packed = {id(layer.weight) for _, layer in layers_in_bits(made.model)}
    whole = {name: full(p).detach().clone() for name, p in names.items()}
    return {name: w.view(torch.uint8).float() if id(names[name]) in packed else w for name, w in whole.items()}


def ties_on_the_last_rank(completions, name, **_):
    """The other rows, those of the first rank, give a pair at once."""
    return [
        float(i % 2 if int(n.split()[1]) % 8 < 4 else zlib.crc32(text.encode()) % 5 // 4)
        for i, (text, n) in enumerate(zip(completions, name, strict=True))
    ]


def poisoned(step):
    """A model whose activations are NaN on the last rank in this step, when it is trained."""
    model = tiny.causal_lm(sharpness=1.0)
    model.poison = False

    def hook(module, args, output):
        bad = model.poison and torch.is_grad_enabled() and on_last_rank()
        return (
            (output[0] * float("nan"), *output[1:])
            if bad and isinstance(output, tuple)
            else (output * float("nan") if bad else None)
        )

    model.model.layers[0].register_forward_hook(hook)
    return model


class Poison(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        unwrapped(model).poison = state.global_step + 1 == self.step


def on_last_rank():
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def evaluation_of(made):
    if made.eval_dataset is None:
        return {}
    return {k: v for k, v in made.evaluate().items() if "runtime" not in k and "per_second" not in k}


def run(out, way, case, processes, batch=8, steps=3, poisoned_step=None, fits=True, **options):
    sampling.ROOM = 1.25 if fits else 1e18
    kwargs = dict(options.pop("kwargs", {}))
    if "model_init_kwargs" in options:
        options["model"] = str(out / options["model"])
    if poisoned_step is not None:
        options["model"] = poisoned(poisoned_step)
        kwargs["callbacks"] = [Poison(poisoned_step)]
    made = trainer(
        out / f"runs-{processes}" / f"{way}-{case}",
        per_device_train_batch_size=batch // processes,
        train_sampling_strategy="sequential",
        train_dataset=options.pop("train_dataset", None) or dataset(lengths=LENGTHS * 2),
        **{"optim": "sgd", "max_steps": steps, "learning_rate": 0.05, "max_tokens_per_pass": 80, **options},
        **ways(way),
        kwargs=kwargs,
    )
    assert made.accelerator.num_processes == processes and made.sharding.name == (way if processes > 1 else "none")
    watch = Watch(made)
    made.add_callback(watch)
    before = evaluation_of(made)
    taken = TakesRecords(made)
    made.train()
    logs = [without_times(log) for log in step_logs(made)]
    saved = {"logs": logs, "weights": whole_weights(made), "passes": watch.passes, "changed": watch.changed}
    saved["rows"] = taken.rows
    if before:
        saved["eval"] = before | {f"{name} at the end": value for name, value in evaluation_of(made).items()}
    if case == "plain" and processes > 1:
        saved["exports"] = exports(made.sharding)
    torch.save(saved, out / f"{way}-{case}-of-{processes}-rank-{made.accelerator.process_index}.pt")


LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
BF16 = {**quantized.NF4, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16"}


def qlora(settings, **options):
    """An adapter over weights that bitsandbytes holds; the folder of the base model stands beside the results."""
    return dict(model="base", model_init_kwargs={"quantization_config": settings}, **{"learning_rate": 0.5, **options})


CASES = {
    "plain": dict(steps=5),
    "accumulated": dict(gradient_accumulation_steps=2, batch=4, max_tokens_per_pass=50),
    "one pass": dict(max_tokens_per_pass=4000),
    "clipped": dict(optim="adamw_torch", max_grad_norm=0.1, learning_rate=1e-3, steps=4),
    "evaluated": dict(kwargs={"eval_dataset": dataset(lengths=(3, 4, 5, 6, 7))}, per_device_eval_batch_size=2),
    "synced": dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5),
    "lora": dict(kwargs={"peft_config": LoraConfig(**LORA)}, learning_rate=0.5),
    "checkpointed": dict(gradient_checkpointing=True),
    "not finite": dict(optim="adamw_torch", max_grad_norm=1.0, learning_rate=1e-3, poisoned_step=2),
}
BIASED = LoraConfig(**{**LORA, "bias": "all"})
STEPS = dict(steps=2, learning_rate=0.05)
HALF = dict(optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0)
CASES_IN_BF16 = {
    "bf16": dict(bf16=True, **HALF),
    "bf16 lora": dict(bf16=True, kwargs={"peft_config": LoraConfig(**LORA)}, **HALF),
    "bf16 qlora": qlora(BF16, bf16=True, kwargs={"peft_config": LINEAR}, steps=2, **HALF),
}
"""Rounding differs between the ways: what must hold is that policy and reference agree before the first step."""
CASES_OF_MODELS = {
    "xpo": dict(method="xpo", xpo_alpha=0.01, **STEPS),
    "nash_md": dict(method="nash_md", mixture_coef=0.25, temperature=1.0, **STEPS),
    "resampled": dict(reward_funcs=ties_on_the_last_rank, resample_rounds=2, **STEPS),
    "other reference": dict(kwargs={"ref_model": tiny.causal_lm("gpt2", sharpness=1.0)}, **STEPS),
    "trained biases": dict(
        model=tiny.causal_lm("qwen2", sharpness=1.0), kwargs={"peft_config": BIASED}, learning_rate=0.5, steps=2
    ),
    "module head": dict(model=tiny.causal_lm("gemma2"), **STEPS),
    "layer by layer": dict(fits=False, **STEPS),
    "lora xpo": dict(
        method="xpo", xpo_alpha=0.01, kwargs={"peft_config": LoraConfig(**LORA)}, learning_rate=0.5, steps=2
    ),
}
"""What else touches models, for the ways in which their weights lie in parts."""
AS_FLOATS = {**quantized.NF4, "bnb_4bit_quant_storage": "float32", "bnb_4bit_use_double_quant": True}
CASES_OF_QLORA = {
    "4 bits": qlora(quantized.NF4, kwargs={"peft_config": LINEAR, "eval_dataset": dataset(lengths=(3, 4, 5, 6, 7))}),
    "4 bits as floats": qlora(AS_FLOATS, kwargs={"peft_config": LINEAR}, fits=False),
    "8 bits": qlora(quantized.INT8, kwargs={"peft_config": LINEAR}),
}
LEFT_OUT = {
    "zero1": ("evaluated", "synced", "lora", "checkpointed", "4 bits", "8 bits", "bf16 lora", "bf16 qlora"),
    "zero2": ("synced", "checkpointed", "8 bits", "bf16 lora", "bf16 qlora"),
}
"""Whole weights, as ddp has them, and the gradients of the other of the two: nothing here is theirs alone."""
ALL = {**CASES, **CASES_OF_MODELS, **CASES_IN_BF16, **CASES_OF_QLORA}


def fitting(way, case):
    """Whether a case belongs to a way of sharding."""
    if case in CASES_OF_MODELS or case == "4 bits as floats":
        return way not in WHOLE
    if case in LEFT_OUT.get(way, ()):
        return False
    return (way, case) != ("fsdp2", "8 bits")  # it is refused


def main():
    torch.set_num_threads(1)
    out, processes = Path(sys.argv[1]), int(sys.argv[2])
    chosen = sys.argv[4].split(",") if len(sys.argv) > 4 else [*ALL]
    for way, case in itertools.product(sys.argv[3].split(","), chosen):
        if not fitting(way, case):
            continue
        try:
            run(out, way, case, processes, **copy.deepcopy(ALL[case]))
        except BaseException:
            print(f"CASE {way} {case} rank {os.environ.get('RANK')}", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the other rank may wait in a collective operation


if __name__ == "__main__":
    main()
