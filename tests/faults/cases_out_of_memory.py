"""Out of memory, wherever memory is asked for."""

from __future__ import annotations

from faults.harness import ANY, Either, Fault, OneLine, Resumes, Survived, scorer
from faults.injection import out_of_memory, raises

SAVES = dict(max_steps=4, save_steps=2)
EVALUATES = dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=2)
TOLD = OneLine(1, "memory")
PLACES = {
    "sampling": "online_dpo.rollout.builtin.engine:TransformersEngine.generate",
    "log-probabilities": "online_dpo.training.objective_step:row_logprobs",
    "the loss": "online_dpo.training.trainer:OnlineDPOTrainer.compute_loss",
    "the backward pass": "torch:Tensor.backward",
    "clipping": "accelerate:Accelerator.clip_grad_norm_",
    "the optimizer": "torch.optim.adamw:AdamW.step",
    "packing": "online_dpo.training.objective_step:ObjectiveStep.pack",
    "the trial of the fast paths": "online_dpo.modeling.forward_path:PathChoice.settle",
    "saving the weights": "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "saving the optimizer": "torch:save",
    "loading the model": "online_dpo.training.build:load_causal_lm",
}

FAULTS = [
    *(
        Fault(
            "memory",
            f"once in {name}",
            Resumes(Either(Survived(like=ANY), TOLD, OneLine(2, "memory"))),
            options=SAVES,
            inject=lambda child, target=target: child.at_call(
                target, 2 if target != PLACES["loading the model"] else 1, out_of_memory()
            ),
        )
        for name, target in PLACES.items()
    ),
    *(
        Fault(
            "memory",
            f"always in {name}",
            Either(TOLD, OneLine(2, "memory")),
            options=SAVES,
            inject=lambda child, target=target: child.at_call(target, None, out_of_memory()),
        )
        for name, target in PLACES.items()
    ),
    *(
        Fault(
            "memory",
            f"{name} in evaluation",
            Resumes(Either(Survived(like=ANY), TOLD)),
            options=SAVES | EVALUATES,
            inject=lambda child, times=times: child.at_call(
                "online_dpo.evaluation.evaluator:Evaluator.evaluate", times, out_of_memory()
            ),
        )
        for name, times in {"once": 1, "always": None}.items()
    ),
    Fault(
        "memory",
        "Python's own in a reward function",
        Resumes(OneLine(1, "MemoryError", "words")),
        files={"feedback.py": scorer("if calls == 3: raise MemoryError()")},
    ),
    Fault(
        "memory",
        "of the GPU in a reward function",
        Resumes(OneLine(1, "words", "memory")),
        files={
            "feedback.py": scorer("import torch\nif calls == 3: raise torch.OutOfMemoryError('CUDA out of memory')")
        },
    ),
    Fault(
        "memory",
        "Python's own in the backward pass",
        Resumes(OneLine(1, "MemoryError")),
        inject=lambda child: child.at_call("torch:Tensor.backward", 2, raises(MemoryError())),
    ),
    Fault(
        "memory",
        "as torch says it of a CPU",
        Resumes(Either(OneLine(1, "memory"), Survived())),
        inject=lambda child: child.at_call(
            "torch:Tensor.backward",
            2,
            raises(
                RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: "
                    "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
                )
            ),
        ),
    ),
    Fault(
        "memory",
        "on one rank of two",
        Resumes(OneLine(1, "memory")),
        processes=2,
        options=SAVES,
        inject=lambda child: child.at_call("torch:Tensor.backward", 2, out_of_memory()) if child.rank else None,
    ),
]
