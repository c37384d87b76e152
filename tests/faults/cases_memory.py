"""Memory that runs out, in every stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faults.harness import ANY, Fault, OneLine, Resumes, Survived
from faults.injection import Child, out_of_memory, raises

ON_CPU = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
KINDS = {"on a GPU": out_of_memory(), "on a CPU": raises(ON_CPU), "of Python": raises(MemoryError("no room"))}
SAMPLING = "online_dpo.rollout.builtin.engine:TransformersEngine._sample"
PASS = "online_dpo.training.objective_step:ObjectiveStep.losses"
REFERENCE = "online_dpo.training.objective_step:ObjectiveStep._reference_logprobs"
OPTIMIZER = "torch.optim.adamw:AdamW.step"
SAVING = "transformers.modeling_utils:PreTrainedModel.save_pretrained"
LOADING = "transformers.modeling_utils:PreTrainedModel.from_pretrained"
TRIAL = "online_dpo.modeling.forward_path:_choose_path"
EVALUATED = dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=2)


def at(target: str, number: int | None, action: Callable[[], None]) -> Callable[[Child], None]:
    return lambda child: child.at_call(target, number, action)


def faults(kind: str, action: Callable[[], None]) -> list[Fault]:
    quick = kind != "of Python"

    def fault(name: str, ending: Any, target: str, number: int | None, **more: Any) -> Fault:
        return Fault("memory", f"{name}, {kind}", ending, inject=at(target, number, action), quick=quick, **more)

    lowered = "Lower `"
    return [
        fault("sampling, once", Survived("ran out of memory"), SAMPLING, 3),
        fault("sampling, always", OneLine(1, lowered), SAMPLING, None),
        fault("a pass, once", Survived("split in two", like=ANY), PASS, 2),
        fault("a pass, always", OneLine(1, lowered), PASS, None),
        fault("the reference", Survived("split in two", like=ANY), REFERENCE, 2),
        fault(
            "the optimizer's first step",
            OneLine(1, "half done", lowered),
            OPTIMIZER,
            1,
            options=dict(optim="adamw_torch"),
        ),
        fault(
            "the optimizer's third step",
            Resumes(OneLine(1, "half done", lowered, "checkpoint-2")),
            OPTIMIZER,
            3,
            options=dict(optim="adamw_torch", save_steps=1),
        ),
        fault("the first trial, once", Survived(), TRIAL, 1),
        fault("loading the policy", OneLine(1, "Memory ran out", lowered), LOADING, 1),
        fault("the first save", OneLine(1), SAVING, 1, options=dict(save_steps=2)),
        fault("an evaluation, always", OneLine(1, lowered), PASS, None, options=EVALUATED | dict(eval_on_start=True)),
    ]


FAULTS = [fault for kind, action in KINDS.items() for fault in faults(kind, action)]
