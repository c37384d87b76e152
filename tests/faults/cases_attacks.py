"""Checkpoints, folders and names that somebody has made in order to do harm; their manifests have the right hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.damage import Change, edited_json, stopped_after, written
from faults.harness import ANY, SECRET, Either, Fault, OneLine, Survived

OUT = "out/checkpoint-2"
NAMED = ("--resume_from_checkpoint", OUT)
MARKS = "a](javascript:alert(1)) | <script>x</script> `b` *c*"


def sealed(change: Change, edit: Callable[[dict[str, Any]], object] = lambda content: None) -> Change:
    """Changes a checkpoint, and its manifest as well, so that every size and hash is right."""

    def seal(folder: Path) -> None:
        from online_dpo.checkpoints import manifest

        place = folder / OUT
        change(folder)
        content = json.loads((place / manifest.FILE).read_bytes())
        content.pop("sha256")
        entries = manifest.entries_of(place, manifest.files_in(place))
        content["files"] = {name: {"size": e.size, "sha256": e.sha256} for name, e in entries.items()}
        edit(content)
        text = json.dumps({"sha256": manifest._hash_of(content), **content})
        (place / manifest.FILE).write_text(text)

    return seal


def attack(name: str, ending: Any, *changes: Change, words: tuple[str, ...] = NAMED, **more: Any) -> Fault:
    options = dict(save_steps=1) | more.pop("options", {})
    prepare = stopped_after(2, *changes)
    return Fault("security", name, ending, options=options, trained={}, prepare=prepare, words=words, **more)


def manifest_with(edit: Callable[[dict[str, Any]], object]) -> Change:
    return sealed(lambda folder: None, edit)


def state_with(**values: Any) -> Change:
    return sealed(edited_json(f"{OUT}/trainer_state.json", lambda state: state.update(values)))


def extra_file(content: dict[str, Any], name: str) -> None:
    content["files"][name] = {"size": 1, "sha256": "0" * 64}


def linked(name: str) -> Change:
    """A link in the output folder that leads to a folder elsewhere, with something dear in it."""

    def link(folder: Path) -> None:
        (folder / "elsewhere/inside").mkdir(parents=True)
        (folder / "elsewhere/inside/dear.txt").write_text("dear")
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).symlink_to(folder / "elsewhere")

    return link


def file_link(name: str) -> Change:
    """A link in the output folder that leads to the data."""

    def link(folder: Path) -> None:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).symlink_to(folder / "data.jsonl")

    return link


MANIFEST = OneLine(2, "checkpoint-2", "manifest.json")
STATE = OneLine(2, "checkpoint-2", "trainer_state.json")

FAULTS = [
    *(
        attack(
            f"a manifest that names {name}",
            MANIFEST,
            manifest_with(lambda content, name=name: extra_file(content, name)),
        )
        for name in ("../../data.jsonl", "/etc/passwd", "a/../../x", "./optimizer.pt", "", "..")
    ),
    *(
        attack(
            f"a manifest whose {name} is {value!r}",
            MANIFEST,
            manifest_with(lambda c, n=name, v=value: c.update({n: v})),
        )
        for name, value in (
            ("files", ["optimizer.pt"]),
            ("files", {"optimizer.pt": 3}),
            ("files", {"optimizer.pt": {"size": "1", "sha256": 2}}),
            ("step", "two"),
            ("world_size", None),
            ("sequence", "1e400"),
            ("finite", "yes"),
            ("extra", [1]),
            ("versions", {"torch": 3}),
        )
    ),
    attack("a manifest without sequence", MANIFEST, manifest_with(lambda content: content.pop("sequence"))),
    attack("a manifest nested 100,000 deep", MANIFEST, written(f"{OUT}/manifest.json", '{"a":' * 100_000)),
    attack(
        "a manifest of 100 MB", MANIFEST, written(f"{OUT}/manifest.json", '{"sha256": "' + "0" * 100_000_000 + '"}')
    ),
    attack(
        "a manifest whose run is no mapping",
        Either(OneLine(2, "checkpoint-2"), Survived()),
        manifest_with(lambda content: content["extra"].update(run=["x"])),
    ),
    *(
        attack(f"a state whose {name} is {value!r}", STATE, state_with(**{name: value}))
        for name, value in (
            ("global_step", -1),
            ("global_step", 2.5),
            ("global_step", True),
            ("epoch", float("nan")),
            ("epoch", "0.5"),
            ("max_steps", "4"),
            ("log_history", "none"),
            ("log_history", [1, 2]),
            ("best_model_checkpoint", ["x"]),
            ("stateful_callbacks", 3),
        )
    ),
    attack(
        "a state with a field that there is not",
        Either(OneLine(2, "checkpoint-2"), OneLine(1, "checkpoint-2")),
        state_with(injected=1),
    ),
    attack(
        "a state nested 100,000 deep",
        STATE,
        sealed(written(f"{OUT}/trainer_state.json", "[" * 100_000)),
    ),
    attack(
        "measurements of a checkpoint that are mark-up",
        Survived(like=ANY),
        state_with(log_history=[{"loss": MARKS, "step": MARKS}]),
    ),
    *(
        Fault(
            "security",
            f"a link to another folder in place of {name}",
            Either(Survived(), OneLine(2), OneLine(1)),
            options=dict(save_steps=1, save_total_limit=1),
            prepare=linked(name),
        )
        for name in ("checkpoint-1", ".checkpoint-1.partial", ".checkpoint-1.removed", ".model.partial")
    ),
    Fault(
        "security",
        "a link to a file in place of a file that is written aside",
        Survived(),
        prepare=file_link(".README.md.partial"),
    ),
    Fault("security", "a hub token with a line end", OneLine(2, "hub_token"), options=dict(hub_token=f"{SECRET}\n")),
    Fault(
        "security",
        "a hub token on the command line",
        Survived(),
        words=("--hub_token", SECRET),
    ),
    Fault(
        "security",
        "a hub token that is a list",
        OneLine(2, "hub_token"),
        options=dict(hub_token=[SECRET]),
    ),
    Fault(
        "security",
        "a token for loading in model_init_kwargs",
        OneLine(2, "model_init_kwargs"),
        options=dict(model_init_kwargs={"token": SECRET}),
    ),
    Fault(
        "security",
        "a key in judge_kwargs",
        OneLine(2, "judge_kwargs"),
        options=dict(reward_funcs=None, judge="llm", judge_kwargs={"model": "m", "api_key": SECRET}),
    ),
    Fault(
        "security",
        "mark-up in the name of a reward",
        Survived(like=ANY),
        files={
            "feedback.py": "def words(completions, **columns):\n"
            "    return [sum(map(ord, c)) % 101 / 101 for c in completions]\n"
            f"words.__name__ = {MARKS!r}\n"
        },
    ),
    Fault(
        "security",
        "mark-up in the name of the output folder",
        Survived(like=ANY),
        options=dict(run_name=MARKS, hub_model_id=f"me/{MARKS}"),
    ),
]
