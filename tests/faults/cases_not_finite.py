"""What is not finite, or absurd: scores, losses, gradients, weights, fields."""

from __future__ import annotations

from typing import Any

import yaml

from faults.damage import edited_tensors
from faults.ground import run_file
from faults.harness import ANY, Fault, OneLine, Survived, scorer
from faults.injection import Child

SAVES = dict(max_steps=4, save_steps=1)


def nan_weights(child: Child, step: int) -> None:
    """The optimizer writes a NaN into the weights in this step."""

    def wrap(original):
        calls = [0]

        def call(self, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            calls[0] += 1
            if calls[0] == step:
                self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
            return result

        return call

    child.patch("torch.optim.adamw:AdamW.step", wrap)


def nan_results(target: str, numbers: set[int] | None):
    """The calls with these numbers (all, if `None`) give NaN."""

    def inject(child: Child) -> None:
        calls = [0]

        def wrap(original):
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                result = original(*args, **kwargs)
                return result * float("nan") if numbers is None or calls[0] in numbers else result

            return call

        child.patch(target, wrap)

    return inject


def nan_gradients(numbers: set[int] | None):
    """The backward passes with these numbers leave a NaN in a gradient."""

    def inject(child: Child) -> None:
        calls = [0]

        def wrap(original):
            def call(self, *args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if numbers is None or calls[0] in numbers:
                    self = self * float("nan")
                return original(self, *args, **kwargs)

            return call

        child.patch("torch:Tensor.backward", wrap)

    return inject


def set_to(value: float):
    """The first number of each tensor."""

    def change(tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[0] = value

    return change


FIELDS = {
    "learning_rate": [".nan", ".inf", "1.0e+30", "-1.0", "true", "fast"],
    "beta": [".nan", ".inf", "-0.1", "1.0e+12"],
    "temperature": [".nan", ".inf", "-1"],
    "top_p": [".nan", "0"],
    "min_p": [".nan", "-0.5"],
    "weight_decay": [".nan", ".inf", "-1"],
    "max_grad_norm": [".nan"],
    "warmup_steps": [".nan", "-3"],
    "skipped_step_lr_factor": [".nan", "-1"],
    "max_skipped_steps": ["-1"],
    "num_completions": ["0", "1000000000", "2.5", "1e9999"],
    "max_new_tokens": ["-4", "1000000000000000"],
    "per_device_train_batch_size": ["10000000000"],
    "gradient_accumulation_steps": ["-1"],
    "save_steps": [".nan"],
    "logging_steps": [".nan"],
    "seed": ["1e30", ".nan"],
    "missing_eos_penalty": [".nan", ".inf"],
    "label_temperature": [".nan", "-1"],
    "reward_weights": ["[.nan]", "[.inf]", "[]", "[1, 2, 3]"],
    "reward_timeout": [".nan", "0", "-1"],
    "repetition_penalty": [".nan", "-1"],
}


def absurd_fields() -> list[Fault]:
    return [
        Fault(
            "numbers",
            f"{name}: {value}",
            OneLine(2, name),
            files={"run.yaml": yaml.safe_dump({**yaml.safe_load(run_file({})), name: "HERE"}).replace("HERE", value)},
            quick=number == 0,
        )
        for name, values in FIELDS.items()
        for number, value in enumerate(values)
    ]


SCORES = {
    "one score is NaN": "scores[:-1] + [float('nan')]",
    "one score is infinite": "[float('inf')] + scores[1:]",
    "one score is minus infinity": "[-float('inf')] + scores[1:]",
    "one score is None": "[None] + scores[1:]",
    "one score is 10**400": "[10 ** 400] + scores[1:]",
    "one score is 1e308 and one -1e308": "[1e308, -1e308] + scores[2:]",
}

FAULTS = [
    *absurd_fields(),
    *(
        Fault(
            "numbers",
            f"{name} in step 2",
            Survived(like=ANY),
            files={"feedback.py": scorer(returns=f"{expression} if calls == 2 else scores")},
        )
        for name, expression in SCORES.items()
    ),
    *(
        Fault("numbers", f"all scores are {name}", OneLine(3, "words"), files={"feedback.py": scorer(returns=returns)})
        for name, returns in {
            "NaN": "[float('nan')] * len(scores)",
            "None": "[None] * len(scores)",
            "equal": "[1.0] * len(scores)",
            "infinite": "[float('inf')] * len(scores)",
        }.items()
    ),
    Fault(
        "numbers",
        "nothing is trained any more after step 2",
        OneLine(1, "max_idle_steps", "checkpoint-"),
        options=dict(max_steps=12, save_steps=100, max_idle_steps=3),
        files={"feedback.py": scorer(returns="scores if calls <= 2 else [1.0] * len(scores)")},
    ),
    Fault(
        "numbers",
        "the loss of step 2 is NaN",
        Survived(like=ANY),
        options=SAVES,
        inject=nan_results("online_dpo.training.trainer:OnlineDPOTrainer.compute_loss", {2}),
    ),
    Fault(
        "numbers",
        "every loss is NaN",
        OneLine(1, "3 steps in a row"),
        options=dict(max_skipped_steps=3, max_steps=6),
        inject=nan_results("online_dpo.training.trainer:OnlineDPOTrainer.compute_loss", None),
    ),
    Fault(
        "numbers",
        "every loss from step 3 on is NaN",
        OneLine(1, "3 steps in a row", "checkpoint"),
        options=dict(max_skipped_steps=3, max_steps=8),
        inject=nan_results("online_dpo.training.trainer:OnlineDPOTrainer.compute_loss", {3, 4, 5, 6, 7, 8}),
    ),
    Fault("numbers", "the gradient of step 2 is NaN", Survived(like=ANY), options=SAVES, inject=nan_gradients({2})),
    Fault(
        "numbers",
        "every gradient is NaN",
        OneLine(1, "2 steps in a row"),
        options=dict(max_skipped_steps=2, max_steps=6),
        inject=nan_gradients(None),
    ),
    Fault(
        "numbers",
        "the gradient of step 2 is NaN on one rank of two",
        Survived(like=ANY),
        processes=2,
        options=SAVES,
        inject=lambda child: nan_gradients({2})(child) if child.rank == 1 else None,
    ),
    *(
        Fault(
            "numbers",
            f"the optimizer writes NaN into the weights in step {step}",
            OneLine(1, "finite", *([f"checkpoint-{step - 1}"] if step > 1 else [])),
            options=SAVES,
            inject=lambda child, step=step: nan_weights(child, step),
        )
        for step in (1, 3, 4)
    ),
    Fault(
        "numbers",
        "the optimizer writes NaN into the weights without any checkpoint",
        OneLine(1, "finite"),
        options=dict(save_strategy="no"),
        inject=lambda child: nan_weights(child, 3),
    ),
    Fault(
        "numbers",
        "the weights of the policy's folder are NaN",
        OneLine(2, "policy", "finite"),
        prepare=edited_tensors("policy/model.safetensors", set_to(float("nan"))),
    ),
    Fault(
        "numbers",
        "the weights of the policy's folder are infinite",
        OneLine(2, "policy", "finite"),
        prepare=edited_tensors("policy/model.safetensors", set_to(float("inf"))),
    ),
    Fault(
        "numbers",
        "the weights of the policy's folder are all zero",
        OneLine(2, "policy", "zero"),
        prepare=edited_tensors("policy/model.safetensors", lambda ts: [t.zero_() for t in ts.values()]),
    ),
]
