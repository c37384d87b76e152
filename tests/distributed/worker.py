"""Run by torchrun with two processes (and by plain Python with one): trains a step in several settings and saves what
came out.
"""

import resource
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback, TrainerState

from online_dpo.errors import NothingTrainedError, OnlineDPOError
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.training.learning_rate import LearningRateBackoff
from online_dpo.training.step_guard import StepGuard
from support import quantized, tiny
from support.killed_runs import limit_file_size
from support.recorded import TakesRecords
from support.training import LORA, KeepGradient, dataset, trainer, weights, word_reward

LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8)


def only_rows_of_the_first_rank(completions, name, **_):
    """With a batch of 4 a rank and a sequential sampler, rank 0 holds the rows 0 to 3."""
    return [float(i % 2) if int(n.split()[1]) < 4 else None for i, n in enumerate(name)]


def different_words(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def ties_on_the_last_rank(completions, name, **_):
    """The other rows, those of the first rank, give a pair at once."""
    return [
        float(i % 2 if int(n.split()[1]) < 4 else zlib.crc32(text.encode()) % 5 // 4)
        for i, (text, n) in enumerate(zip(completions, name, strict=True))
    ]


def run(out, case, processes, **options):
    keep = KeepGradient()
    kwargs = {"ref_model": tiny.causal_lm(seed=5, sharpness=1.0), **options.pop("kwargs", {})}
    made = trainer(
        out / "runs",
        per_device_train_batch_size=8 // processes,
        train_sampling_strategy="sequential",
        train_dataset=options.pop("train_dataset", None) or dataset(lengths=LENGTHS),
        optim="sgd",
        kwargs=kwargs,
        **options,
    )
    assert made.accelerator.num_processes == processes
    made.callback_handler.callbacks.insert(0, keep)
    taken = TakesRecords(made)
    calls, generate = [], made.sampler.engine.generate
    made.sampler.engine.generate = lambda prompts, *args: (calls.append(len(prompts)), generate(prompts, *args))[1]
    with suppress(NothingTrainedError):  # where every step is skipped
        made.train()
    log = {
        k: v
        for k, v in made.state.log_history[made.state.global_step - 1].items()
        if not k.startswith(("time/", "perf/", "judge/seconds"))
    }
    saved = {"gradient": keep.last, "log": log, "weights": weights(made.model), "calls": calls, "rows": taken.rows}
    if made.eval_dataset is not None:
        saved["eval"] = {k: v for k, v in made.evaluate().items() if "runtime" not in k and "per_second" not in k}
    torch.save(saved, out / f"{case}-of-{processes}-rank-{made.accelerator.process_index}.pt")


def qlora(out, processes):
    """An adapter over weights in 4 bits."""
    folder = str(out / "base")
    torch.manual_seed(7)  # the same adapter on every rank and in one process
    run(
        out,
        "qlora",
        processes,
        model=folder,
        model_init_kwargs={"quantization_config": quantized.NF4},
        kwargs={"ref_model": None, "peft_config": LoraConfig(**LORA)},
        max_steps=2,
        learning_rate=5.0,
        train_dataset=dataset(lengths=LENGTHS * 2),
    )


class FailsOnTheLastRank(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if on_last_rank() and state.global_step == 1:
            raise OSError("no space left")


class FullDiskOnTheLastRank(TrainerCallback):
    """From the second step on, no file of that process grows beyond 100 bytes."""

    def on_step_end(self, args, state, control, **kwargs):
        if on_last_rank() and state.global_step == 2:
            limit_file_size(100)


def fails_on_the_last_rank(completions, trainer_state=None, **_):
    if on_last_rank() and trainer_state.global_step == 1:
        raise ConnectionError("away")
    return [float(len(text.split())) for text in completions]


def ends_in_failure(out, case, processes, kwargs=None, **options):
    """How a run ends in which something of the user's fails on one rank alone, after the first step."""
    made = trainer(
        out / case,
        per_device_train_batch_size=8 // processes,
        train_dataset=dataset(lengths=LENGTHS * 3),
        max_steps=3,
        kwargs=kwargs,
        **options,
    )
    try:
        made.train()
    except OnlineDPOError as error:
        limit_file_size(resource.RLIM_INFINITY)
        ended = {"error": f"{type(error).__name__}: {error}", "step": made.state.global_step}
        ended["checkpoints"] = sorted(path.name for path in (out / case).glob("checkpoint-*"))
        torch.save(ended, out / f"{case}-of-{processes}-rank-{made.accelerator.process_index}.pt")


def on_last_rank():
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def poisoned_on_the_last_rank():
    model = tiny.causal_lm(sharpness=1.0)

    def hook(module, args, output):
        if module.training and on_last_rank():
            return output[0] * float("nan"), output[1]
        return None

    model.register_forward_hook(hook)
    return model


def guard_alone(out, processes):
    """A loss that is not finite on one rank while all gradients are: only the guard can tell the others."""
    accelerator = Accelerator(cpu=True)
    backoff, model = LearningRateBackoff(0.5, 4, trains=lambda: guard.trains), torch.nn.Linear(2, 1)
    guard = StepGuard(accelerator, max_skipped_steps=3, max_idle_steps=None, backoff=backoff)
    model.weight.grad = torch.ones(1, 2)
    guard.expect(num_pairs=4)
    guard.saw_gradient_norm(1.0)
    guard.saw_loss(torch.tensor(float("nan") if on_last_rank() else 0.7))
    optimizer = torch.optim.SGD(model.parameters())
    guard.on_pre_optimizer_step(None, TrainerState(), None, model=model, optimizer=optimizer)
    found = {"dropped": model.weight.grad is None, "debt": backoff.debt}
    torch.save(found, out / f"guard-of-{processes}-rank-{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, processes = Path(sys.argv[1]), int(sys.argv[2])
    run(out, "plain", processes)
    run(
        out,
        "accumulated",
        processes,
        gradient_accumulation_steps=2,
        train_dataset=dataset(lengths=LENGTHS * 2),
        report_to="tensorboard",
    )
    run(
        out,
        "weighted",
        processes,
        num_completions=3,
        pair_selection="all_pairs",
        reward_funcs=[word_reward, different_words],
        margin_weighting=True,
        label_temperature=2.0,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        max_steps=2,
        train_dataset=dataset(lengths=LENGTHS * 2),
    )
    steps = dict(max_steps=2, learning_rate=0.05, target_kl=0.5, train_dataset=dataset(lengths=LENGTHS * 2))
    run(out, "xpo", processes, method="xpo", xpo_alpha=0.01, **steps)
    run(out, "nash_md", processes, method="nash_md", mixture_coef=0.25, temperature=1.0, **steps)
    run(out, "one_sided", processes, reward_funcs=only_rows_of_the_first_rank)
    run(out, "resampled", processes, reward_funcs=ties_on_the_last_rank, resample_rounds=2)
    stream = IterableDataset.from_generator(lambda: iter(dataset(lengths=LENGTHS).to_list()))
    run(out, "stream", processes, train_dataset=stream)
    uneven = dataset(lengths=(*LENGTHS, 5, 6))  # the second step has two prompts, both on the first rank
    run(out, "uneven", processes, train_dataset=uneven, max_steps=2)
    run(
        out,
        "evaluated",
        processes,
        per_device_eval_batch_size=2,
        kwargs={"eval_dataset": dataset(lengths=(3, 4, 5, 6, 7))},
    )
    judge = LLMJudge(model="m", base_url=sys.argv[3], concurrency=4, cache=None)
    run(out, "judged", processes, reward_funcs=None, num_completions=4, kwargs={"judge": judge})
    qlora(out, processes)
    run(out, "not_finite", processes, model=poisoned_on_the_last_rank(), learning_rate=0.1)
    guard_alone(out, processes)
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_log"):
        ends_in_failure(out, event, processes, kwargs={"callbacks": [FailsOnTheLastRank(event)]})
    full = dict(save_strategy="steps", save_steps=1, kwargs={"callbacks": [FullDiskOnTheLastRank()]})
    ends_in_failure(out, "fails_in_save", processes, **full)
    ends_in_failure(out, "fails_in_step", processes, reward_funcs=fails_on_the_last_rank)
    evaluated = dict(eval_strategy="steps", eval_steps=1, kwargs={"eval_dataset": dataset(lengths=(3, 4, 5, 6))})
    ends_in_failure(out, "fails_in_evaluation", processes, reward_funcs=fails_on_the_last_rank, **evaluated)
