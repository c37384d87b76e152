"""Memory that runs out, in every stage of a run, as torch says it on a GPU or a CPU, and as Python does.

A test of each place that asks for memory is quick for a GPU; a CPU and Python are quick where the code is another.
"""

from __future__ import annotations

from typing import Any

from faults.harness import ANY, Ending, Fault, OneLine, Resumes, Survived, scorer
from faults.injection import out_of_memory, raises

ON_CPU = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
KINDS = {"on a GPU": out_of_memory(), "on a CPU": raises(ON_CPU), "of Python": raises(MemoryError("no memory"))}
SAMPLING = "online_dpo.rollout.builtin.engine:TransformersEngine._sample"
GENERATE = "online_dpo.rollout.builtin.engine:TransformersEngine.generate"
PASS = "online_dpo.training.objective_step:ObjectiveStep.losses"
PACKING = "online_dpo.training.objective_step:ObjectiveStep.pack"
REFERENCE = "online_dpo.training.objective_step:ObjectiveStep._reference_logprobs"
BACKWARD = "torch:Tensor.backward"
CLIPPING = "accelerate:Accelerator.clip_grad_norm_"
OPTIMIZER = "torch.optim.adamw:AdamW.step"
SAVING = "transformers.modeling_utils:PreTrainedModel.save_pretrained"
SAVING_OPTIMIZER = "torch:save"
LOADING = "online_dpo.training.build:load_causal_lm"
FROM_FOLDER = "transformers.modeling_utils:PreTrainedModel.from_pretrained"
TRIAL = "online_dpo.modeling.forward_path:_choose_path"
SETTLING = "online_dpo.modeling.forward_path:PathChoice.settle"
EVALUATING = "online_dpo.evaluation.evaluator:Evaluator.evaluate"
ADAMW = dict(optim="adamw_torch")
EVALUATED = dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=2)
LOWER = "Lower `"
TOLD = OneLine(1, "memory")
QUICK_ELSEWHERE = ("sampling, once", "a pass, once", "the optimizer's third step", "loading the policy")
"""What is quick on a CPU and in Python as well."""


def fault(name: str, kind: str, ending: Ending, target: str, number: int | None, **options: Any) -> Fault:
    """Memory runs out at the call of ``target`` with this number, or at each if it is `None`."""
    return Fault(
        "memory",
        f"{name}, {kind}",
        ending,
        options={"save_steps": 2, **options},
        inject=lambda child: child.at_call(target, number, KINDS[kind]),
        quick=kind == "on a GPU" or name in QUICK_ELSEWHERE,
    )


def faults(kind: str) -> list[Fault]:
    """Of a run in which memory runs out in one way."""

    def here(name: str, ending: Ending, target: str, number: int | None, **options: Any) -> Fault:
        return fault(name, kind, ending, target, number, **options)

    return [
        here("sampling, once", Survived("ran out of memory"), SAMPLING, 3),
        here("sampling, always", OneLine(1, LOWER), SAMPLING, None),
        here("beside sampling", Resumes(TOLD), GENERATE, 2),
        here("packing", Resumes(TOLD), PACKING, 2),
        here("a pass, once", Survived("split in two", like=ANY), PASS, 2),
        here("a pass, always", OneLine(1, LOWER), PASS, None),
        here("the reference", Survived("split in two", like=ANY), REFERENCE, 2),
        here("the backward pass, once", Survived("split in two", like=ANY), BACKWARD, 2),
        here("the backward pass, always", OneLine(1, LOWER), BACKWARD, None),
        here("clipping", Resumes(TOLD), CLIPPING, 2),
        here("the optimizer's first step", OneLine(1, "half done", LOWER), OPTIMIZER, 1, **ADAMW),
        here(
            "the optimizer's third step", Resumes(OneLine(1, "half done", LOWER, "checkpoint-2")), OPTIMIZER, 3, **ADAMW
        ),
        here("the first trial, once", Survived(), TRIAL, 1),
        here("the first trial, always", OneLine(1, "memory"), SETTLING, None),
        here("loading the policy", OneLine(1, "Memory ran out", LOWER), LOADING, 1),
        here("reading the policy", OneLine(1, "Memory ran out", LOWER), FROM_FOLDER, 1),
        here("the first save of weights", TOLD, SAVING, 1),
        here("every save of weights", TOLD, SAVING, None),
        here("the first save of the optimizer", TOLD, SAVING_OPTIMIZER, 1),
        here("an evaluation's passes", OneLine(1, LOWER), PASS, None, **EVALUATED, eval_on_start=True),
        here("an evaluation, once", Resumes(TOLD), EVALUATING, 1, **EVALUATED),
        here("an evaluation, always", Resumes(TOLD), EVALUATING, None, **EVALUATED),
    ]


def scoring(name: str, before: str, *words: str) -> Fault:
    return Fault(
        "memory",
        f"a reward function, {name}",
        Resumes(OneLine(1, "words", *words)),
        files={"feedback.py": scorer(before)},
    )


def on_one_rank(name: str, rank: int, ending: Ending, target: str, number: int | None, **fields: Any) -> Fault:
    """Memory runs out on one of two ranks."""
    return Fault(
        "memory",
        f"{name}, on rank {rank} of two",
        ending,
        processes=2,
        limit=90.0,
        inject=lambda child: child.at_call(target, number, out_of_memory()) if child.rank == rank else None,
        **{"options": dict(save_steps=2, ddp_timeout=20), **fields},
    )


GOES_ON = Survived("ran out of memory", like=ANY)
EVALUATED_BY_TWO = dict(options={**EVALUATED, "ddp_timeout": 20, "eval_on_start": True})
FAULTS = [
    *(one for kind in KINDS for one in faults(kind)),
    scoring("of Python", "if calls == 3: raise MemoryError()", "MemoryError"),
    scoring("on a GPU", "import torch\nif calls == 3: raise torch.OutOfMemoryError('CUDA out of memory')", "memory"),
    on_one_rank("the backward pass, once", 1, GOES_ON, BACKWARD, 2),
    on_one_rank("the backward pass, once", 0, GOES_ON, BACKWARD, 3, quick=False),
    on_one_rank("the backward pass, always", 1, OneLine(1, LOWER), BACKWARD, None),
    on_one_rank("a pass, once", 0, GOES_ON, PASS, 1),
    on_one_rank("a pass, always", 0, OneLine(1, LOWER), PASS, None, quick=False),
    on_one_rank("the reference, once", 1, GOES_ON, REFERENCE, 4, quick=False),
    on_one_rank("sampling, once", 1, Survived("ran out of memory"), SAMPLING, 3),
    on_one_rank("sampling, always", 1, OneLine(1, LOWER), SAMPLING, None, quick=False),
    on_one_rank("packing", 1, Resumes(TOLD), PACKING, 2),
    on_one_rank("the first trial, once", 1, Survived(), TRIAL, 1, quick=False),
    on_one_rank("an evaluation's passes", 1, OneLine(1, LOWER), PASS, None, **EVALUATED_BY_TWO),
    on_one_rank("clipping", 1, Resumes(TOLD), CLIPPING, 2, quick=False),
]
