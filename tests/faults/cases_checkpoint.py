"""Checkpoints that are torn, damaged or not all there, and resuming from them."""

from __future__ import annotations

from faults.damage import (
    Change,
    all_of,
    cut_in_half,
    edited_json,
    edited_tensors,
    emptied,
    flipped,
    lengthened,
    removed,
    stopped_after,
    written,
    zeroed,
)
from faults.ground import FEEDBACK, OPTIONS
from faults.harness import ANY, RESUME, Fault, OneLine, Survived

SAVES = dict(save_steps=1)
LAST = "out/checkpoint-3"
FROM_LAST = ("--resume_from_checkpoint", LAST)
DAMAGES = {
    "is missing": removed,
    "is empty": emptied,
    "is cut in half": cut_in_half,
    "has a flipped bit": flipped,
    "ends in zeros": zeroed,
    "is too long": lengthened,
}
FILES = {
    "model.safetensors": {},
    "optimizer.pt": {},
    "scheduler.pt": {},
    "rng_state.pth": {},
    "trainer_state.json": {},
    "training_args.bin": {},
    "config.json": {},
    "tokenizer.json": {},
    "guard.json": {},
    "beta.json": dict(target_kl=0.1),
    "lookahead-0.*": dict(max_staleness=1),
    "reference.*": dict(sync_ref_model=True, ref_model_sync_steps=1),
}
"""Files of a checkpoint, and the options with which it has them."""
SAMPLES = {"model.safetensors", "optimizer.pt", "trainer_state.json", "lookahead-0.*"}
"""Those for which each damage is in the shorter list, resumed by its path: that trains nothing."""


def resumed(name: str, change: Change, **options) -> Fault:
    """Resumed without a path: from the newest whole one, saying so, and to the same end."""
    return Fault(
        "checkpoint",
        f"{name}, resumed without a path",
        Survived("checkpoint-2", "checkpoint-3"),
        options=SAVES | options,
        trained={},
        prepare=stopped_after(3, change),
        words=RESUME,
    )


def refused(name: str, change: Change, *words: str, **options) -> Fault:
    """Resumed with a path: one line names the file and the folder."""
    return Fault(
        "checkpoint",
        f"{name}, resumed by its path",
        OneLine(2, "checkpoint-3", *words),
        options=SAVES | options,
        trained={},
        prepare=stopped_after(3, change),
        words=FROM_LAST,
    )


def damaged() -> list[Fault]:
    made = []
    for number, (file, options) in enumerate(FILES.items()):
        for which, (damage, change) in enumerate(DAMAGES.items()):
            own, shown = number % (len(DAMAGES) - 1) == which - 1, file.replace(".*", "")
            quick = file in SAMPLES or which == 0 or own
            made += [
                resumed(f"{shown} {damage}", change(f"{LAST}/{file}"), **options).but(quick=own),
                refused(f"{shown} {damage}", change(f"{LAST}/{file}"), shown, **options).but(quick=quick),
            ]
    return made


def poison(tensors: dict) -> None:
    tensors["model.norm.weight"][0] = float("nan")


OTHERS = [
    resumed("is an empty folder", all_of(removed(LAST), lambda folder: (folder / LAST).mkdir())),
    refused("is an empty folder", all_of(removed(LAST), lambda folder: (folder / LAST).mkdir())),
    resumed("is a file", all_of(removed(LAST), written(LAST, "nothing"))).but(ending=Survived("checkpoint-2")),
    refused("is a file", all_of(removed(LAST), written(LAST, "nothing"))),
    refused("is not there", removed(LAST)),
    resumed("has weights of another shape", edited_tensors(f"{LAST}/model.safetensors", lambda t: t.popitem())),
    refused("has weights that are not finite", edited_tensors(f"{LAST}/model.safetensors", poison)),
    resumed("says another step", edited_json(f"{LAST}/trainer_state.json", lambda s: s.update(global_step=2))),
    refused("says another step", edited_json(f"{LAST}/trainer_state.json", lambda s: s.update(global_step=2))),
    refused("says a step beyond all", edited_json(f"{LAST}/trainer_state.json", lambda s: s.update(global_step=9))),
    Fault(
        "checkpoint",
        "none is whole, resumed without a path",
        OneLine(2, "checkpoint-1", "optimizer.pt"),
        options=SAVES,
        trained={},
        prepare=stopped_after(1, removed("out/checkpoint-1/optimizer.pt")),
        words=RESUME,
    ),
    Fault(
        "checkpoint",
        "two of three are torn, resumed without a path",
        Survived("checkpoint-1"),
        options=SAVES,
        trained={},
        prepare=stopped_after(3, removed(f"{LAST}/optimizer.pt"), emptied("out/checkpoint-2/model.safetensors")),
        words=RESUME,
    ),
    Fault("checkpoint", "none is there, resumed without a path", OneLine(2, "checkpoint", "out"), words=RESUME),
    Fault(
        "checkpoint",
        "a path to no folder",
        OneLine(2, "nowhere/checkpoint-1"),
        words=("--resume_from_checkpoint", "nowhere/checkpoint-1"),
    ),
    Fault(
        "checkpoint",
        "a path to a model that is no checkpoint",
        OneLine(2, "policy"),
        words=("--resume_from_checkpoint", "policy"),
    ),
    Fault(
        "checkpoint",
        "the last whole one is kept by rotation beside a torn one",
        Survived(),
        options=dict(save_steps=1, save_total_limit=1),
        trained=dict(save_total_limit=4),
        prepare=stopped_after(2, emptied("out/checkpoint-2/optimizer.pt")),
        words=RESUME,
    ),
    Fault(
        "checkpoint",
        "strangers' folders beside them",
        Survived(),
        options=SAVES,
        trained={},
        prepare=stopped_after(
            3,
            lambda folder: (folder / "out/checkpoint-9-backup").mkdir(),
            lambda folder: (folder / "out/checkpoint-x").mkdir(),
            written("out/checkpoint-7.tar", "x"),
        ),
        words=RESUME,
    ),
]

OTHER_RUNS = {
    "seed": dict(seed=7),
    "num_completions": dict(num_completions=3),
    "per_device_train_batch_size": dict(per_device_train_batch_size=4),
    "learning_rate": dict(learning_rate=0.02),
    "beta": dict(beta=0.5),
    "loss_type": dict(loss_type="ipo"),
    "method": dict(method="xpo"),
    "max_new_tokens": dict(max_new_tokens=5),
    "temperature": dict(temperature=0.5),
    "max_staleness": dict(max_staleness=1),
    "optim": dict(optim="sgd"),
}
"""A run that was begun without these, and is resumed with them."""
IN_IDENTITY = {"seed", "num_completions", "learning_rate", "beta", "loss_type", "max_new_tokens", "temperature"}
"""Those that `cases_identity.py` has in the shorter list."""


def other_runs() -> list[Fault]:
    made = []
    for name, options in OTHER_RUNS.items():
        reset = {field: OPTIONS.get(field) for field in options}
        common = dict(options=SAVES | options, trained=reset, prepare=stopped_after(2))
        made.append(
            Fault(
                "identity",
                f"resumed with another {name}",
                OneLine(2, name, "resume_anyway"),
                words=RESUME,
                quick=name not in IN_IDENTITY,
                **common,
            )
        )
    return [
        *made,
        Fault(
            "identity",
            "resumed with other prompts",
            OneLine(2, "data.jsonl", "resume_anyway"),
            options=SAVES,
            trained={},
            prepare=stopped_after(2, written("data.jsonl", '{"prompt": "w1 w2"}\n{"prompt": "w3 w4"}\n' * 4)),
            words=RESUME,
        ),
        Fault(
            "identity",
            "resumed with another reward function",
            OneLine(2, "reward_funcs", "resume_anyway"),
            options=SAVES | dict(reward_funcs=["feedback.py:others"]),
            files={"feedback.py": FEEDBACK + "def others(completions):\n    return list(map(len, completions))\n"},
            trained=dict(reward_funcs=OPTIONS["reward_funcs"]),
            prepare=stopped_after(2),
            words=RESUME,
        ),
        Fault(
            "identity",
            "resumed with a reward function that was mended",
            Survived(like=ANY),
            options=SAVES,
            trained={},
            prepare=stopped_after(2),
            files={"feedback.py": "def words(completions):\n    return [float(len(text)) for text in completions]\n"},
            words=RESUME,
        ),
        Fault(
            "identity",
            "resumed with another model",
            OneLine(2, "model", "resume_anyway"),
            options=SAVES,
            trained={},
            prepare=stopped_after(
                2, edited_tensors("policy/model.safetensors", lambda t: t["model.norm.weight"].mul_(1.5))
            ),
            words=RESUME,
        ),
        Fault(
            "identity",
            "started anew in the folder of another run",
            OneLine(2, "out", "checkpoint", "resume_from_checkpoint"),
            options=dict(save_steps=1, seed=3),
            trained=dict(seed=None),
            prepare=stopped_after(2),
        ),
    ]


FAULTS = [*damaged(), *OTHERS, *other_runs()]
