"""Signals that stop a run, at any moment and on any rank."""

from __future__ import annotations

import os
import random
import signal

from faults.harness import Either, Fault, Killed, Resumes, Stops, Survived, scorer
from faults.injection import Action, sends
from faults.runs import Running

SAVES = dict(max_steps=6, save_steps=4)
EVALUATES = dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=1)
SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT")
AT_STEPS = {
    "as step 1 begins": lambda child, action: child.at_step(1, action),
    "as step 3 begins": lambda child, action: child.at_step(3, action),
    "as step 2 ends": lambda child, action: child.at_step_end(2, action),
    "while step 3 is sampled": lambda child, action: child.at_call(
        "online_dpo.rollout.sampler:Sampler.sample", 3, action
    ),
    "in the backward pass of step 2": lambda child, action: child.at_call("torch:Tensor.backward", 2, action),
    "in the optimizer of step 2": lambda child, action: child.at_call("torch.optim.adamw:AdamW.step", 2, action),
    "in the save of step 4": lambda child, action: child.at_call("torch:save", 2, action),
}


def code_of(name: str) -> int:
    return 128 + getattr(signal, name)


def sent(name: str, when: str, times: int = 1):
    def action() -> None:
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))

    return lambda child: AT_STEPS[when](child, action)


def at_random_moments(processes: int, seed: int) -> list[Fault]:
    moments = random.Random(seed)
    return [
        Fault(
            "signal",
            f"SIGTERM at random moment {number} of seed {seed}, {processes} process{'es' * (processes > 1)}",
            Resumes(Either(Stops(143, "SIGTERM", "checkpoint-"), Survived())),
            options=SAVES,
            outside=terminated_after(moments.uniform(0.0, 0.35)),
            processes=processes,
            quick=number <= 10 // processes,
        )
        for number in range(1, 21)
    ]


def terminated_after(part: float):
    """All ranks, after the first step and this part of the time that the run takes."""

    def terminate(running: Running) -> None:
        running.wait_for("step 1/")
        running.wait_more(part * running.whole_seconds)
        running.kill(signal.SIGTERM)

    return terminate


def on_rank(rank: int, action: Action, step: int):
    return lambda child: child.at_step(step, action) if child.rank == rank else None


FAULTS = [
    *(
        Fault(
            "signal",
            f"{name} {when}",
            Resumes(Stops(code_of(name), "checkpoint-")),
            options=SAVES,
            inject=sent(name, when),
            quick=name == "SIGTERM" or when == "as step 3 begins",
        )
        for name in SIGNALS
        for when in AT_STEPS
    ),
    *at_random_moments(1, seed=101),
    *at_random_moments(2, seed=102),
    *(
        Fault(
            "signal",
            f"{name} to rank {rank} of 2 alone",
            Resumes(Stops(code_of(name), "checkpoint-")),
            options=SAVES,
            inject=on_rank(rank, sends(getattr(signal, name)), 3),
            processes=2,
            quick=name == "SIGTERM" or (name, rank) == ("SIGINT", 1),
        )
        for name in ("SIGTERM", "SIGUSR1", "SIGINT")
        for rank in (0, 1)
    ),
    *(
        Fault(
            "signal",
            f"Ctrl-C twice {when}",
            Resumes(Stops(130)),
            options=SAVES,
            inject=sent("SIGINT", when, 2),
            quick=when in ("as step 3 begins", "while step 3 is sampled", "in the save of step 4"),
        )
        for when in AT_STEPS
    ),
    Fault(
        "signal",
        "SIGTERM twice in the save of step 4",
        Resumes(Stops(143)),
        options=SAVES,
        inject=sent("SIGTERM", "in the save of step 4", 2),
    ),
    Fault(
        "signal",
        "SIGTERM in an evaluation",
        Resumes(Stops(143, "checkpoint-")),
        options=SAVES | EVALUATES,
        inject=lambda child: child.at_call(
            "online_dpo.evaluation.evaluator:Evaluator.evaluate", 3, sends(signal.SIGTERM)
        ),
    ),
    Fault(
        "signal",
        "SIGTERM while a reward function waits",
        Resumes(Stops(143, "checkpoint-2")),
        options=SAVES | dict(stop_timeout=1.0),
        files={"feedback.py": scorer("if calls == 3:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(300)")},
    ),
    Fault(
        "signal",
        "SIGTERM while the models load",
        Either(Stops(143), Killed(signal.SIGTERM)),
        inject=lambda child: child.at_call("online_dpo.training.build:load_causal_lm", 1, sends(signal.SIGTERM)),
    ),
    Fault(
        "signal",
        "Ctrl-C while the models load",
        Stops(130),
        inject=lambda child: child.at_call("online_dpo.training.build:load_causal_lm", 1, sends(signal.SIGINT)),
    ),
    Fault(
        "signal",
        "SIGTERM while the final model is saved",
        Resumes(Either(Stops(143), Survived())),
        options=SAVES,
        inject=lambda child: child.at_call("online_dpo.cli.terminal.summary:number", 1, sends(signal.SIGTERM)),
    ),
    Fault(
        "signal",
        "SIGHUP that is ignored, as under nohup",
        Survived(),
        inject=lambda child: (signal.signal(signal.SIGHUP, signal.SIG_IGN), child.at_step(2, sends(signal.SIGHUP))),
    ),
]
