"""Run by torchrun with two processes (and by plain Python with one): trains in one way of sharding, many times."""

import copy
import os
import sys
import traceback
from pathlib import Path

import torch
from peft import LoraConfig

from support.training import LORA, dataset, step_logs, trainer, without_times

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
        return {"fsdp": "full_shard", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if name.startswith("zero"):
        config = copy.deepcopy(ZERO)
        config["zero_optimization"]["stage"] = int(name[4])
        return {"deepspeed": config}
    return {}


def whole_weights(made):
    from online_dpo.distributed.sharding import full

    names = {n.removeprefix("module."): p for n, p in made.model.named_parameters()}
    return {name: full(p).detach().clone() for name, p in names.items()}


def run(out, way, case, processes, batch=8, steps=3, **options):
    kwargs = options.pop("kwargs", {})
    made = trainer(
        out / f"runs-{processes}" / f"{way}-{case}",
        per_device_train_batch_size=batch // processes,
        train_sampling_strategy="sequential",
        train_dataset=options.pop("train_dataset", None) or dataset(lengths=LENGTHS * 2),
        **{"optim": "sgd", "max_steps": steps, "learning_rate": 0.05, "max_tokens_per_pass": 80, **options},
        **ways(way),
        kwargs=kwargs,
    )
    assert made.accelerator.num_processes == processes
    made.train()
    logs = [without_times(log) for log in step_logs(made)]
    saved = {"logs": logs, "weights": whole_weights(made)}
    if made.eval_dataset is not None:
        saved["eval"] = {k: v for k, v in made.evaluate().items() if "runtime" not in k and "per_second" not in k}
    torch.save(saved, out / f"{way}-{case}-of-{processes}-rank-{made.accelerator.process_index}.pt")
    return made


CASES = {
    "plain": {},
    "accumulated": dict(gradient_accumulation_steps=2, batch=4),
    "one pass": dict(max_tokens_per_pass=4000),
    "clipped": dict(optim="adamw_torch", max_grad_norm=0.1, learning_rate=1e-3),
    "evaluated": dict(kwargs={"eval_dataset": dataset(lengths=(3, 4, 5, 6, 7))}, per_device_eval_batch_size=2),
    "synced": dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5),
    "lora": dict(kwargs={"peft_config": LoraConfig(**LORA)}, learning_rate=0.5),
    "checkpointed": dict(gradient_checkpointing=True),
}


def main():
    torch.set_num_threads(1)
    out, way, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    chosen = sys.argv[4].split(",") if len(sys.argv) > 4 else CASES
    for case in chosen:
        try:
            run(out, way, case, processes, **copy.deepcopy(CASES[case]))
        except BaseException:
            print(f"CASE {way} {case} rank {os.environ.get('RANK')}", file=sys.stderr)
            traceback.print_exc()
            if processes == 1:
                raise
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
