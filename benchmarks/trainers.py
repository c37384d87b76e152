"""The two trainers under test, built alike, with their lengths forced and their phases timed.

Everything is hung onto instances from outside: neither trainer knows that it is measured. Shapes: ``B`` sequences that
are sampled together, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import MemoryMeter, PhaseTimer
from workloads import (
    EOS,
    FIRST_RESERVED,
    FIRST_WORD,
    MODELS,
    PROMPTS_PER_STEP,
    Workload,
    make_policy,
    make_reward_model,
    make_tokenizer,
    make_workload,
)


@dataclass(frozen=True)
class Job:
    """What one worker process trains.

    ``side`` is "ours" or "trl"; ``steps`` the optimizer steps that there are prompts for, ``prompts`` those of each;
    ``trl_cache`` is "dynamic" or "static". ``lora`` trains an adapter of rank 16 on all linear layers instead of the
    whole model; ``fields`` are fields of our configuration that are not at their default.
    """

    side: str
    workload: str
    model: str
    device: str
    dtype: str
    threads: int
    steps: int
    trl_cache: str = "dynamic"
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    lora: bool = False
    prompts: int = PROMPTS_PER_STEP
    fields: dict[str, Any] = field(default_factory=dict)


class Probe:
    """Collects what one step did: seconds or memory, which prompts, how long the completions were, which were trained.

    ``rows``: the prompts' rows. ``lengths``: tokens of all completions, a list for each prompt. ``trained``: tokens of
    the two completions of each pair. ``weights``: a checksum of each model before training.
    """

    weights: list[float]

    def __init__(self, device: str) -> None:
        self.timer = PhaseTimer(torch.cuda.synchronize if device == "cuda" else lambda: None)
        self.meter = MemoryMeter(device)
        self._metering = False

    def start(self, memory: bool) -> None:
        self.rows: list[int] = []
        self.lengths: list[list[int]] = []
        self.trained: list[list[int]] = []
        self._metering = memory
        if memory:
            self.meter.start()
        self.timer.start()

    def stop(self) -> dict[str, Any]:
        seconds = self.timer.stop()
        measured = {"memory": self.meter.stop()} if self._metering else {"seconds": seconds}
        return {**measured, "rows": self.rows, "lengths": self.lengths, "trained": self.trained}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.timer.phase(name):
            if self._metering and name == "generate":
                self.meter.boundary("non_generation")
            yield
            if self._metering and name == "generate":
                self.meter.boundary("generation")

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return inside

    def saw_completions(self, workload: Workload, rows: list[int], lengths: list[list[int]]) -> None:
        wanted = [workload.lengths[row][: len(got)] for row, got in zip(rows, lengths, strict=True)]
        assert lengths == wanted, f"completions of {lengths} tokens, asked for {wanted}"
        self.rows, self.lengths = rows, lengths

    def time_optimizer(self, trainer: Any) -> None:
        """To be called when training begins: only then there is an optimizer."""
        trainer._clip_grad_norm = self.timed("optimizer", trainer._clip_grad_norm)
        trainer.optimizer.step = self.timed("optimizer", trainer.optimizer.step)
        trainer.model.zero_grad = self.timed("optimizer", trainer.model.zero_grad)


def build(job: Job, output_dir: str, probe: Probe) -> Any:
    """The trainer of a job, ready for ``train()``."""
    torch.set_num_threads(job.threads)
    shape = MODELS[job.model]
    workload = make_workload(job.workload, shape.vocabulary, job.steps, job.prompts)
    policy, reward_model = make_policy(shape, job.device), make_reward_model(shape, job.device, job.dtype)
    probe.weights = [checksum(policy), checksum(reward_model)]
    parts = dict(
        model=policy,
        reward_funcs=reward_model,
        train_dataset=workload.dataset(),
        processing_class=make_tokenizer(shape),
        reward_processing_classes=make_tokenizer(shape),
    )
    trainer = (_build_ours if job.side == "ours" else _build_trl)(job, workload, output_dir, parts, probe)
    trainer.accelerator.backward = probe.timed("backward", trainer.accelerator.backward)
    return trainer


def checksum(model: torch.nn.Module) -> float:
    """A number that models with the same weights share, and hardly any others."""
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def _arguments(job: Job, workload: Workload, output_dir: str) -> dict[str, Any]:
    """Fields that both configurations have, with the same meaning."""
    return dict(
        output_dir=output_dir,
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device != "cpu",
        bf16=job.dtype == "bfloat16",  # mixed precision over fp32 weights
        gradient_checkpointing=job.gradient_checkpointing,
        per_device_train_batch_size=job.prompts,
        gradient_accumulation_steps=1,
        max_steps=job.steps,
        optim=job.optim,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=[0.1],
        temperature=1.0,
        max_new_tokens=workload.max_new_tokens,
        max_length=workload.max_length,
        seed=0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=10**6,
    )


# --- ours ------------------------------------------------------------------------------------------------------------


def _build_ours(job: Job, workload: Workload, output_dir: str, parts: dict[str, Any], probe: Probe) -> Any:
    from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    # TRL trains ties as well; reward models in bf16 do tie.
    args = OnlineDPOConfig(
        **_arguments(job, workload, output_dir),
        num_completions=workload.completions,
        tie_policy="first",
        **job.fields,
    )
    trainer: Any = OnlineDPOTrainer(**parts, args=args, peft_config=_adapter() if job.lora else None)
    force_our_lengths(workload)
    generate, score, compute_loss = (
        trainer.sampler.engine.generate,
        trainer.collector.assessor.assess,
        trainer.compute_loss,
    )

    def generate_and_check(*args: Any, **kwargs: Any) -> Any:
        at_once = trainer.sampler.engine.batch_size
        with probe.phase("generate"):
            groups = generate(*args, **kwargs)
        assert trainer.sampler.engine.batch_size == at_once, "sampling ran out of memory and was cut into parts"
        rows = [workload.row_of(group.prompt.token_ids[-1]) for group in groups]
        lengths = [[len(completion.token_ids) for completion in group.completions] for group in groups]
        probe.saw_completions(workload, rows, lengths)
        return groups

    def score_and_remember(groups: Any) -> Any:
        with probe.phase("score"):
            scores = score(groups)
        for lengths, values in zip(probe.lengths, scores.values, strict=True):
            probe.trained.append([lengths[values.index(max(values))], lengths[values.index(min(values))]])
        return scores

    def loss_of_whole_step(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any, **kwargs: Any) -> Any:
        assert int(num_items_in_batch) == len(probe.rows), "a prompt has given no pair"
        with probe.phase("policy_forward"):
            return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.sampler.engine.generate = generate_and_check
    trainer.collector.assessor.assess = score_and_remember
    trainer.objective._reference_logprobs = probe.timed("reference", trainer.objective._reference_logprobs)
    trainer.compute_loss = loss_of_whole_step
    return trainer


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def force_our_lengths(workload: Workload) -> None:
    """From now on, completions sampled in this process have the workload's lengths. Tokens are drawn as ever; then an
    end token takes the place of the last one, and any word the place of special tokens before it.
    """
    from online_dpo.rollout.builtin import engine

    class ForcedBatch(engine.Batch):
        def __init__(self, prompts: Any, num_completions: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(prompts, num_completions, *args, **kwargs)
            rows = [workload.row_of(prompt.token_ids[-1]) for prompt in prompts]
            lengths = [length for row in rows for length in workload.lengths[row][:num_completions]]
            self._last_step_B = _last_steps(workload, lengths, self.ids_BT.device)

        def write(self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, logps_B: torch.Tensor) -> None:
            if self.params.end_token_ids:  # there are none while the engine tries its decoder
                token_B.masked_fill_(token_B < FIRST_RESERVED, FIRST_WORD)  # in place: these are what is gone on with
                token_B.masked_fill_(self._last_step_B[rows_B] == step, EOS)
            super().write(step, rows_B, token_B, logps_B)

    engine.Batch = ForcedBatch  # pyright: ignore[reportAttributeAccessIssue]


def _last_steps(workload: Workload, lengths: list[int], device: torch.device) -> torch.Tensor:
    """The step in which each sequence ends; a length of ``max_new_tokens`` is a sequence that does not end."""
    return torch.tensor([n - 1 if n < workload.max_new_tokens else -1 for n in lengths], device=device)


# --- TRL -------------------------------------------------------------------------------------------------------------


def _build_trl(job: Job, workload: Workload, output_dir: str, parts: dict[str, Any], probe: Probe) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    cache = {"cache_implementation": "static"} if job.trl_cache == "static" else None
    if cache is not None:
        let_static_caches_hold_two_dtypes()
    args = OnlineDPOConfig(**_arguments(job, workload, output_dir), generation_kwargs=cache)
    trainer: Any = OnlineDPOTrainer(**parts, args=args)
    force_trl_lengths(trainer.model, workload)
    generate, forward = trainer._generate, trainer._forward

    def generate_and_check(*args: Any, **kwargs: Any) -> Any:
        with probe.phase("generate"):
            sampled = generate(*args, **kwargs)
        prompt_ids_BT, _, _, completion_mask_BT, _ = sampled
        lengths_B = completion_mask_BT.sum(dim=1).tolist()
        rows = [workload.row_of(token) for token in prompt_ids_BT[: len(prompt_ids_BT) // 2, -1].tolist()]
        pairs = [list(pair) for pair in zip(lengths_B[: len(rows)], lengths_B[len(rows) :], strict=True)]
        probe.saw_completions(workload, rows, pairs)
        probe.trained = pairs
        return sampled

    def forward_of_either(model: Any, *args: Any, **kwargs: Any) -> Any:
        with probe.phase("reference" if model is trainer.ref_model else "policy_forward"):
            return forward(model, *args, **kwargs)

    trainer._generate = generate_and_check
    trainer._forward = forward_of_either
    trainer._calculate_rewards_from_functions = probe.timed("score", trainer._calculate_rewards_from_functions)
    return trainer


def let_static_caches_hold_two_dtypes() -> None:
    """From now on, values in a static cache of transformers have their own dtype. Until 5.17 and some versions after it
    they get that of the keys, which the rotary embedding makes fp32 under autocast, and the first value is an error.
    """
    from transformers.cache_utils import StaticLayer

    initialize = StaticLayer.lazy_initialization

    def with_own_dtypes(self: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        initialize(self, key_states, value_states)
        if self.values.dtype != value_states.dtype:
            self.values = torch.zeros_like(self.values, dtype=value_states.dtype)
            torch._dynamo.mark_static_address(self.values)

    StaticLayer.lazy_initialization = with_own_dtypes


def force_trl_lengths(model: Any, workload: Workload) -> None:
    """The same for ``model.generate`` called with prompts ``[p0 .. pn, p0 .. pn]``: all first completions, then all
    second ones. The scores of special tokens are forbidden, and at the last step all others.
    """
    from transformers import LogitsProcessorList

    generate = model.generate

    def generate_forced(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        count = len(input_ids) // 2
        rows = [workload.row_of(token) for token in input_ids[:, -1].tolist()]
        lengths = [workload.lengths[row][b // count] for b, row in enumerate(rows)]
        last_step_B = _last_steps(workload, lengths, input_ids.device)
        ending_steps = set(last_step_B.tolist())

        def force(so_far_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            step = so_far_BT.shape[1] - input_ids.shape[1]
            scores_BV[:, :FIRST_RESERVED] = float("-inf")
            if step in ending_steps:
                ends_B1 = (last_step_B == step)[:, None]
                scores_BV.masked_fill_(ends_B1, float("-inf"))
                scores_BV[:, EOS].masked_fill_(ends_B1[:, 0], 0.0)
            return scores_BV

        return generate(*args, input_ids=input_ids, logits_processor=LogitsProcessorList([force]), **kwargs)

    model.generate = generate_forced
