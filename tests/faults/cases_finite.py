"""Numbers that become NaN or infinite in a run: weights, gradients, scores, preferences, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.harness import ANY, Fault, OneLine, Resumes, Survived, scorer
from faults.injection import Child

STEP_END = "transformers.trainer_callback:CallbackHandler.on_step_end"
GRADIENT = "online_dpo.training.step_guard:StepGuard.saw_gradient_norm"
SAVED = dict(save_steps=1)


def weight_becomes(number: float, step: int, rank: int | None = None) -> Callable[[Child], None]:
    """At the end of a step, one number of a weight becomes this one."""

    def inject(child: Child) -> None:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, args: Any, state: Any, *others: Any, **named: Any) -> Any:
                if state.global_step == step and rank in (None, child.rank):
                    next(self.model.parameters()).data.view(-1)[0] = number
                return original(self, args, state, *others, **named)

            return call

        child.patch(STEP_END, wrap)

    return inject


def gradient_is_nan(*steps: int) -> Callable[[Child], None]:
    """The gradients of these steps (from 1) are NaN."""

    def inject(child: Child) -> None:
        calls: list[int] = []

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, norm: Any) -> None:
                calls.append(1)
                original(self, math.nan if len(calls) in steps else norm)

            return call

        child.patch(GRADIENT, wrap)

    return inject


def spoiled_policy(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "policy" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})


JUDGE = "def judge(prompt, first, second):\n    return {}\n"


def judged(returned: str) -> dict[str, Any]:
    return {
        "options": dict(reward_funcs=None, judge="judge.py:judge", max_steps=12, save_steps=4),
        "files": {"judge.py": JUDGE.format(returned)},
    }


FAULTS = [
    Fault(
        "finite",
        "a weight becomes NaN in step 3",
        Resumes(OneLine(1, "not finite", "out/checkpoint-2", "holds 1 of")),
        options=SAVED,
        inject=weight_becomes(math.nan, 3),
    ),
    Fault(
        "finite",
        "a weight becomes infinite in step 2, without checkpoints",
        OneLine(1, "not finite", "No checkpoint has finite weights"),
        options=dict(save_strategy="no"),
        inject=weight_becomes(math.inf, 2),
    ),
    Fault(
        "finite",
        "a weight becomes NaN in the last step",
        OneLine(1, "not finite", "out/checkpoint-2"),
        options=dict(save_steps=2),
        inject=weight_becomes(math.nan, 4),
    ),
    Fault(
        "finite",
        "a weight becomes NaN on one of two ranks",
        OneLine(1, "not finite", "out/checkpoint-2"),
        options=SAVED,
        processes=2,
        inject=weight_becomes(math.nan, 3, rank=1),
    ),
    Fault(
        "finite",
        "a weight becomes NaN with rotation",
        Resumes(OneLine(1, "not finite", "out/checkpoint-2")),
        options=dict(save_steps=1, save_total_limit=1),
        inject=weight_becomes(math.nan, 3),
    ),
    Fault(
        "finite",
        "the policy holds NaN",
        OneLine(2, "start from are not finite", "holds 1 of"),
        prepare=spoiled_policy,
    ),
    Fault(
        "finite",
        "Adam divides by zero",
        OneLine(1, "not finite", "No checkpoint has finite weights"),
        options=dict(adam_epsilon=0.0, learning_rate=100, weight_decay=100.0, max_steps=30, max_grad_norm=0.0),
        quick=False,
    ),
    Fault("finite", "a gradient is NaN in step 2", Survived("skipped", like=ANY), inject=gradient_is_nan(2)),
    Fault(
        "finite",
        "a gradient is NaN in step 2, the learning rate falls",
        Survived("skipped", like=ANY),
        options=dict(skipped_step_lr_factor=0.5, skipped_step_lr_recovery=2),
        inject=gradient_is_nan(2),
    ),
    Fault(
        "finite",
        "gradients are NaN from step 2 on",
        OneLine(1, "3 steps in a row", "weights before them are in out/checkpoint-4"),
        options=dict(max_steps=9, max_skipped_steps=3),
        inject=gradient_is_nan(*range(2, 20)),
    ),
    Fault(
        "finite",
        "all gradients are NaN",
        OneLine(1, "2 steps in a row"),
        options=dict(max_skipped_steps=2),
        inject=gradient_is_nan(*range(1, 20)),
    ),
    Fault(
        "finite",
        "a reward gives NaN from step 3 on",
        Resumes(OneLine(1, "gave no usable answer", "`max_failure_share`")),
        options=dict(max_steps=20, save_steps=2),
        files={"feedback.py": scorer("if calls >= 3: return [float('nan')] * len(completions)")},
    ),
    Fault(
        "finite",
        "a reward gives NaN always",
        OneLine(1, "gave no usable answer to 20 of the last 20", "a score of nan"),
        options=dict(max_steps=20),
        files={"feedback.py": scorer("return [float('nan')] * len(completions)")},
    ),
    Fault(
        "finite",
        "a reward gives infinity once",
        Survived(like=ANY),
        files={"feedback.py": scorer("if calls == 2: return [float('inf')] * len(completions)")},
    ),
    Fault(
        "finite",
        "a reward gives None always",
        OneLine(3, "trained nothing", "missing_score"),
        files={"feedback.py": scorer("return [None] * len(completions)")},
    ),
    Fault(
        "finite",
        "a judge gives NaN always",
        OneLine(1, "gave no usable answer", "preference is nan"),
        **judged("float('nan')"),
    ),
    Fault("finite", "a judge gives infinity", OneLine(1, "judge", "from 0 to 1"), **judged("float('inf')")),
    Fault(
        "idle",
        "all ties from step 3 on",
        Resumes(OneLine(1, "4 steps in a row trained nothing", "tie", "out/checkpoint-6")),
        options=dict(max_steps=8, max_idle_steps=4),
        files={"feedback.py": scorer("if calls >= 3: return [1.0] * len(completions)")},
        quick=False,
    ),
    Fault(
        "idle",
        "all ties from the start",
        OneLine(3, "trained nothing", "tie", "`max_idle_steps`"),
        options=dict(max_steps=8, max_idle_steps=3),
        files={"feedback.py": scorer("return [1.0] * len(completions)")},
    ),
]
