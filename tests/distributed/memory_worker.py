"""Run by torchrun with two processes: memory runs out on one of them, in one pass, and what a step gives then."""

import dataclasses
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from sharding_worker import ways, whole_weights

from online_dpo.modeling.memory import DoesNotFit
from support import tiny
from support.training import LORA, dataset, trainer

LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8, 2, 11, 5, 7, 3, 9, 4, 6)
ON_CPU = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
GPU, PYTHON = torch.OutOfMemoryError("CUDA out of memory."), MemoryError()


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained: the settings, and whether micro-batches have several passes."""

    max_tokens_per_pass: int = 60
    gradient_checkpointing: bool = False
    lora: bool = False
    options: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Spent:
    """Memory that runs out: where, on which ranks, and in which of the run's forward passes of the policy."""

    where: str
    passes: tuple[int, ...] = (1,)
    ranks: tuple[int, ...] = (1,)
    error: Exception = GPU

    def __str__(self):
        where = f"{self.where}, pass {'+'.join(map(str, self.passes[:3]))}, rank {'+'.join(map(str, self.ranks))}"
        return f"{where}, {type(self.error).__name__}"


RUNS = {
    "plain": Run(),
    "whole": Run(max_tokens_per_pass=10_000),
    "checkpointed": Run(gradient_checkpointing=True),
    "adapter": Run(lora=True),
    "buffers": Run(options=(("ddp_broadcast_buffers", True),)),
    "unused": Run(options=(("ddp_find_unused_parameters", True),)),
    "static": Run(options=(("ddp_static_graph", True),)),
}
CASES = [
    ("plain", Spent("reference")),
    ("plain", Spent("first layer")),
    ("plain", Spent("last layer", ranks=(0,), error=ON_CPU)),
    ("plain", Spent("backward of the last layer")),
    ("plain", Spent("gradient of the first layer", ranks=(0, 1), passes=(2,))),
    ("plain", Spent("first layer", passes=(4,))),
    ("plain", Spent("backward of the first layer", passes=(4,))),
    ("plain", Spent("gradient of the last layer", passes=(2, 6), ranks=(0,))),
    ("plain", Spent("first layer", passes=(7,))),
    ("plain", Spent("gradient of the last layer", passes=(4, 12), ranks=(0, 1))),
    ("whole", Spent("first layer", passes=(1, 3, 7))),
    ("whole", Spent("gradient of the first layer", passes=(2,), ranks=(0,))),
    ("checkpointed", Spent("recomputation", passes=(4,))),
    ("checkpointed", Spent("gradient of the first layer", passes=(4,))),
    ("adapter", Spent("gradient of the adapter", passes=(4,))),
    ("buffers", Spent("reference", passes=(5,))),
    ("buffers", Spent("gradient of the first layer", passes=(4,))),
    ("unused", Spent("backward of the first layer", passes=(4,))),
    ("static", Spent("backward of the first layer", passes=(4,))),
    ("static", Spent("gradient of the first layer", passes=(5, 9), ranks=(0,))),
]
ALWAYS = tuple(range(99))
NEVER = [("plain", Spent("first layer", ALWAYS[6:])), ("whole", Spent("loss", ALWAYS, (0, 1)))]


def scores(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


class Injection:
    """Raises in the places of a model, when it is its turn."""

    def __init__(self, made, spent):
        self.spent, self.count, self.fired = spent, 0, 0
        losses, reference = made.objective.losses, made.objective._reference_logprobs

        def counted(model, rows, *args):
            self.count += model.training
            got = losses(model, rows, *args)
            self.here("loss")
            return got

        def of_reference(rows):
            self.here("reference")
            return reference(rows)

        made.objective.losses, made.objective._reference_logprobs = counted, of_reference
        for place, layer in zip(("first layer", "last layer"), layers(made.policy), strict=True):
            self.watch(place, layer)

    def watch(self, place, layer):
        def forward(module, args):
            if not module.training:
                return
            recomputes = torch._C._current_graph_task_id() != -1
            self.here("recomputation" if recomputes else place)

        def after(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if module.training and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.here(f"backward of the {place}"))

        def accumulated(parameter):
            self.here(f"gradient of the {place}")
            self.here("gradient of the adapter")

        layer.mlp.register_forward_pre_hook(forward)  # a layer's own hooks are not called in a recomputation
        layer.register_forward_hook(after)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        trained[len(trained) // 2].register_post_accumulate_grad_hook(accumulated)

    def here(self, where):
        due = where == self.spent.where and self.count in self.spent.passes and dist.get_rank() in self.spent.ranks
        if due and self.fired < self.count:
            self.fired = self.count
            raise self.spent.error


def layers(policy):
    found = [module for name, module in policy.named_modules() if name.endswith(("layers.0", "layers.1"))]
    return found[0], found[-1]


def build(out, run):
    options = ways(WAY) | dict(run.options)
    if run.lora:
        options["kwargs"] = {"peft_config": LoraConfig(**LORA)}
    else:
        options["kwargs"] = {"ref_model": tiny.causal_lm(seed=5, sharpness=1.0)}
    made = trainer(
        out / "runs",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_dataset=dataset(lengths=LENGTHS),
        reward_funcs=scores,
        max_tokens_per_pass=run.max_tokens_per_pass,
        gradient_checkpointing=run.gradient_checkpointing,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        ddp_timeout=120,
        **options,
    )
    return made


def train(out, run, spent=None):
    made = build(out, run)
    injection = Injection(made, spent or Spent("nowhere"))
    done = {"error": None}
    try:
        made.train()
    except DoesNotFit as error:
        done["error"] = str(error)
    logs = [
        {k: v for k, v in log.items() if not k.startswith(("time/", "perf/", "train_"))}
        for log in made.state.log_history
    ]
    return done | {
        "weights": whole_weights(made),
        "logs": logs,
        "passes": injection.count,
        "raised": injection.fired > 0,
        "tokens_that_fit": made.passes.tokens_that_fit,
        "step": made.state.global_step,
        "checkpoints": sorted(path.name for path in (out / "runs").glob("checkpoint-*")),
    }


# of every way of sharding; DDP's own are above
SHARDED = [
    ("plain", Spent("reference")),
    ("plain", Spent("first layer", ranks=(0,))),
    ("plain", Spent("last layer", passes=(4,), error=ON_CPU)),
    ("plain", Spent("loss", passes=(2,), error=PYTHON)),
    ("plain", Spent("backward of the first layer", passes=(4, 12), ranks=(0,))),
    ("plain", Spent("backward of the last layer", passes=(4,), ranks=(0, 1))),
    ("whole", Spent("backward of the last layer", passes=(1, 3), ranks=(0,))),
    ("checkpointed", Spent("recomputation", passes=(4,))),
    ("adapter", Spent("backward of the first layer", passes=(2,))),
]
WAY = sys.argv[2] if len(sys.argv) > 2 else "ddp"


def cases(way):
    return (CASES if way == "ddp" else SHARDED) + NEVER[: 2 if way == "ddp" else 1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    chosen = cases(WAY) if len(sys.argv) < 4 else [cases(WAY)[int(number)] for number in sys.argv[3].split(",")]
    results = {(name, "undisturbed"): train(out, RUNS[name]) for name in dict.fromkeys(name for name, _ in chosen)}
    for name, spent in chosen:
        print(name, spent, flush=True)
        results[name, str(spent)] = train(out / str(spent), RUNS[name], spent)
        torch.save(results, out / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()
