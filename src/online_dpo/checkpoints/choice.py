"""Which checkpoint a run is resumed from: the one that is named, if it is whole, or the newest whole one of a folder.

This module loads nothing heavy: the command line checks a checkpoint before it loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from online_dpo.checkpoints.folders import NAME, by_age, checkpoints_in, located, step_of
from online_dpo.checkpoints.manifest import FILE, has_manifest, manifest_of, problem_of
from online_dpo.checkpoints.needed import STATE, Needs

AUTO = "auto"
"""The value of ``resume_from_checkpoint`` that goes on from the newest checkpoint if there is one."""


@dataclass(frozen=True)
class Choice:
    """The newest whole checkpoint of a folder, if there is one, and why it is none of the newer ones."""

    folder: Path | None
    passed_over: tuple[tuple[Path, str], ...]

    @property
    def reasons(self) -> str:
        """Why the newer ones were passed over, in one line.

        >>> Choice(Path("out/checkpoint-2"), ((Path("out/checkpoint-4"), "optimizer.pt is missing"),)).reasons
        'not from checkpoint-4: optimizer.pt is missing'
        """
        return "; ".join(f"not from {folder.name}: {problem}" for folder, problem in self.passed_over)


def newest_whole(run_dir: Path, needs: Needs) -> Choice:
    """The whole checkpoint that was written last. One without a manifest is never chosen, since nothing says that it
    is whole.
    """
    passed_over, chosen = {}, None
    for folder in reversed(by_age(run_dir)):
        problem = _problem(located(folder), needs)
        if problem is None:
            chosen = folder
            break
        passed_over[folder] = problem
    for folder in checkpoints_in(run_dir):
        unknown = folder not in passed_over and manifest_of(located(folder)) is None
        if unknown and (chosen is None or step_of(folder) > step_of(chosen)):
            passed_over[folder] = _problem(located(folder), needs)
    for path in run_dir.glob("checkpoint-*") if run_dir.is_dir() else ():
        if NAME.fullmatch(path.name) and not path.is_dir() and (chosen is None or step_of(path) > step_of(chosen)):
            passed_over[path] = "it is no folder"
    return Choice(chosen, tuple(sorted(passed_over.items(), key=lambda item: -step_of(item[0]))))


def none_found(run_dir: Path, choice: Choice) -> str:
    """The error message where there is no checkpoint to resume from."""
    if not choice.passed_over:
        return (
            f"{run_dir} holds no checkpoint. Leave `resume_from_checkpoint` out to start a run, or give `{AUTO}`, "
            "which starts one if there is no checkpoint and resumes it if there is."
        )
    return f"{run_dir} holds no checkpoint to resume from: {choice.reasons}."


def problem_of_named(folder: Path, needs: Needs) -> str | None:
    """Why a run cannot be resumed from this folder, in one line that names it; ``None`` if it can."""
    place = located(folder)
    if not place.is_dir():
        return f"there is no folder {folder}."
    if not has_manifest(place) and not (place / STATE).is_file():
        inside = [path.name for path in checkpoints_in(folder)]
        hint = f" It holds {', '.join(inside)}: give one of them." if inside else ""
        return f"{folder} is no checkpoint of a run (no {STATE}).{hint}"
    problem = needs.size_problem_of(place) if not has_manifest(place) else None
    problem = problem or (_problem(place, needs) if has_manifest(place) else needs.problem_of(place))
    return None if problem is None else f"{folder} cannot be resumed from: {problem}."


def warning_of_named(folder: Path) -> str | None:
    """The warning about a checkpoint without a manifest; ``None`` if there is one."""
    if has_manifest(located(folder)):
        return None
    return (
        f"{folder} has no {FILE}: another program or an older version wrote it. It holds the files that are needed, "
        "but nothing says whether they are as they were written."
    )


def _problem(place: Path, needs: Needs) -> str | None:
    if not has_manifest(place):
        return f"it has no {FILE}, so nothing says that it is whole; to resume from it anyway, give its folder"
    return problem_of(place) or needs.size_problem_of(place) or needs.problem_of(place)
