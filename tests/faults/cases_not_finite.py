"""Numbers that become NaN or infinite in a run: scores, preferences, losses, gradients, weights; and idle steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from faults.damage import edited_tensors
from faults.harness import ANY, Fault, OneLine, Resumes, Survived, scorer
from faults.injection import Child

LOSS = "online_dpo.training.trainer:OnlineDPOTrainer.compute_loss"
Inject = Callable[[Child], None]


class From:
    """All numbers from this one on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and number >= self.first


Steps = From | Collection[int]


def each_call(target: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None) -> Inject:
    """``before(number, self)`` gives another ``self``, ``after(number, self, result)`` another result of a call."""

    def inject(child: Child) -> None:
        calls: list[int] = []

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                self = before(len(calls), self) if before else self
                result = original(self, *args, **kwargs)
                return after(len(calls), self, result) if after else result

            return call

        child.patch(target, wrap)

    return inject


def nan_loss(steps: Steps) -> Inject:
    return each_call(LOSS, after=lambda number, _, loss: loss * math.nan if number in steps else loss)


def nan_gradients(steps: Steps) -> Inject:
    return each_call("torch:Tensor.backward", lambda number, loss: loss * math.nan if number in steps else loss)


def weight_becomes(number: float, step: int) -> Inject:
    """What the optimizer writes into a weight in this step."""

    def write(call: int, optimizer: Any, result: Any) -> Any:
        if call == step:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = number
        return result

    return each_call("torch.optim.adamw:AdamW.step", after=write)


def on_rank_1(inject: Inject) -> Inject:
    return lambda child: inject(child) if child.rank == 1 else None


def policy_with(number: float) -> Any:
    """The first number of each tensor of the policy's folder."""

    def edit(tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[0] = number

    return edited_tensors("policy/model.safetensors", edit)


def rewards(name: str, returns: str, ending: Any, quick: bool = True, **options: Any) -> Fault:
    """A reward function that gives something else than ``scores``."""
    files: dict[str, str | bytes] = {"feedback.py": scorer(returns=returns)}
    return Fault("not finite", name, ending, options=options, files=files, quick=quick)


def judged(name: str, returned: str, *words: str) -> Fault:
    options = dict(reward_funcs=None, judge="judge.py:judge", max_steps=12, save_steps=4)
    files: dict[str, str | bytes] = {"judge.py": f"def judge(prompt, first, second):\n    return {returned}\n"}
    return Fault("not finite", f"a judge gives {name}", OneLine(1, *words), options=options, files=files)


def injected(name: str, ending: Any, inject: Inject, quick: bool = True, processes: int = 1, **options: Any) -> Fault:
    return Fault("not finite", name, ending, options=options, inject=inject, quick=quick, processes=processes)


SCORES = {
    "NaN": "scores[:-1] + [float('nan')]",
    "infinite": "[float('inf')] + scores[1:]",
    "minus infinity": "[-float('inf')] + scores[1:]",
    "None": "[None] + scores[1:]",
    "10**400": "[10 ** 400] + scores[1:]",
    "1e308 and another -1e308": "[1e308, -1e308] + scores[2:]",
}
SCORED = [
    *(
        rewards(f"one score of step 2 is {name}", f"{returns} if calls == 2 else scores", Survived(like=ANY))
        for name, returns in SCORES.items()
    ),
    *(
        rewards(f"all scores are {name}", f"[{value}] * len(scores)", OneLine(3, "words", reason), quick=name == "NaN")
        for name, value, reason in [
            ("NaN", "float('nan')", "missing_score"),
            ("None", "None", "missing_score"),
            ("infinite", "float('inf')", "missing_score"),
            ("10**400", "10**400", "missing_score"),
            ("equal", "1.0", "tie"),
        ]
    ),
    rewards(
        "all scores are NaN in a long run",
        "[float('nan')] * len(scores)",
        OneLine(1, "gave no usable answer to 20 of the last 20", "a score of nan"),
        max_steps=20,
    ),
    rewards(
        "all scores are NaN from step 3 on",
        "scores if calls <= 2 else [float('nan')] * len(scores)",
        OneLine(1, "gave no usable answer", "`max_failure_share`", "checkpoint-4"),
        max_steps=20,
    ),
    rewards(
        "all scores are equal from step 3 on",
        "scores if calls <= 2 else [1.0] * len(scores)",
        OneLine(1, "4 steps in a row trained nothing", "tie", "out/checkpoint-6"),
        max_steps=8,
        max_idle_steps=4,
    ),
    rewards(
        "all scores are equal, with `max_idle_steps`",
        "[1.0] * len(scores)",
        OneLine(3, "trained nothing", "tie", "`max_idle_steps`"),
        max_steps=8,
        max_idle_steps=3,
    ),
    judged("NaN", "float('nan')", "gave no usable answer", "preference is nan"),
    judged("infinity", "float('inf')", "judge", "from 0 to 1"),
    judged("10**400", "10**400", "judge", "from 0 to 1"),
    judged("a number of 5000 digits", "10**5000", "judge", "from 0 to 1"),
]
WEIGHTS = [
    injected(
        "a weight becomes NaN in step 3",
        Resumes(OneLine(1, "not finite", "out/checkpoint-2", "holds 1 of")),
        weight_becomes(math.nan, 3),
        save_steps=1,
    ),
    injected(
        "a weight becomes NaN in step 1",
        OneLine(1, "not finite", "No checkpoint has finite weights"),
        weight_becomes(math.nan, 1),
        save_steps=1,
    ),
    injected(
        "a weight becomes infinite in the last step",
        OneLine(1, "not finite", "out/checkpoint-2"),
        weight_becomes(math.inf, 4),
        save_steps=2,
    ),
    injected(
        "a weight becomes NaN without checkpoints",
        OneLine(1, "not finite", "No checkpoint has finite weights"),
        weight_becomes(math.nan, 2),
        save_strategy="no",
        quick=False,
    ),
    injected(
        "a weight becomes NaN with rotation",
        Resumes(OneLine(1, "not finite", "out/checkpoint-2")),
        weight_becomes(math.nan, 3),
        save_steps=1,
        save_total_limit=1,
    ),
    injected(
        "a weight becomes NaN on one of two ranks",
        OneLine(1, "not finite", "out/checkpoint-2"),
        on_rank_1(weight_becomes(math.nan, 3)),
        processes=2,
        save_steps=1,
    ),
    *(
        Fault(
            "not finite",
            f"the policy holds {name}",
            OneLine(2, "policy", "start from are not finite", "holds 1 of"),
            prepare=policy_with(number),
            quick=name == "NaN",
        )
        for name, number in {"NaN": math.nan, "infinity": math.inf}.items()
    ),
]
STEPS = [
    injected("the loss of step 2 is NaN", Survived("skipped", like=ANY), nan_loss({2})),
    injected("every loss is NaN", OneLine(1, "3 steps in a row"), nan_loss(From(1)), max_skipped_steps=3),
    injected(
        "every loss from step 3 on is NaN",
        OneLine(1, "3 steps in a row", "weights before them are in out/checkpoint-5"),
        nan_loss(From(3)),
        max_steps=8,
        max_skipped_steps=3,
    ),
    injected("the gradient of step 2 is NaN", Survived("skipped", like=ANY), nan_gradients({2}), save_steps=1),
    injected(
        "the gradient of step 2 is NaN, the learning rate falls",
        Survived("skipped", like=ANY),
        nan_gradients({2}),
        skipped_step_lr_factor=0.5,
        skipped_step_lr_recovery=2,
    ),
    injected(
        "every gradient is NaN",
        OneLine(1, "2 steps in a row"),
        nan_gradients(From(1)),
        quick=False,
        max_skipped_steps=2,
    ),
    injected(
        "every gradient from step 2 on is NaN",
        OneLine(1, "3 steps in a row", "weights before them are in out/checkpoint-4"),
        nan_gradients(From(2)),
        max_steps=9,
        max_skipped_steps=3,
    ),
    injected(
        "the gradient of step 2 is NaN on one rank of two",
        Survived("skipped", like=ANY),
        on_rank_1(nan_gradients({2})),
        processes=2,
    ),
]
FAULTS = [*SCORED, *WEIGHTS, *STEPS]
