"""What must be true at the end of a run with a fault: what its ending says, and what always holds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from faults.ground import write_files
from faults.harness import (
    ANY,
    RESUME,
    SECRET,
    ByRank,
    Either,
    Ending,
    Fault,
    Killed,
    OneLine,
    Resumes,
    Stops,
    Survived,
    Writes,
)
from faults.runs import Ended, Stage, weights_hash, without_fault
from online_dpo.runs.reading import RunFolder

TIMES = ("time/", "perf/", "judge/seconds")


def check(stage: Stage, fault: Fault, name: str) -> None:
    """Runs a fault, and what resumes it, and checks every end."""
    if fault.writes is None:
        check_run(stage, fault, name, None)
        shutil.rmtree(stage.root / name)  # one that failed is left to look at
        return
    operations = stage.writes(fault)
    numbers = range(fault.writes.first, len(operations) + 1, fault.writes.every)
    assert numbers, operations
    failed = []
    for number in numbers:
        try:
            check_run(stage, fault, f"{name}-{number}", (fault.writes, number))
        except AssertionError as error:
            failed.append(f"=== {operations[number - 1]}, operation {number} of {len(operations)}: {error}")
        shutil.rmtree(stage.root / f"{name}-{number}")
    assert not failed, f"{len(failed)} of {len(numbers)}\n" + "\n".join(failed)


def check_run(stage: Stage, fault: Fault, name: str, write: tuple[Writes, int] | None) -> None:
    with stage.served(fault) as served:
        fault = replace(fault, words=[word.replace("{url}", served.url) for word in fault.words])
        folder = stage.folder(fault, name, served.url)
        ended = check_first(stage, fault, folder, name, write)
        is_over = all(one.code == 0 for one in ended)  # it has gone on: there is nothing to resume
        if isinstance(fault.ending, Resumes) and not is_over:
            served.respond = fault.service and fault.service.right
            check_resumed(stage, fault, folder, name, served.url)


def check_first(
    stage: Stage, fault: Fault, folder: Path, name: str, write: tuple[Writes, int] | None
) -> Sequence[Ended]:
    """The run with the fault; returns how it ended."""
    before = {path.name for path in (folder / "out").glob("checkpoint-*")}
    seconds = stage.whole_seconds(fault) if fault.outside is not None else 0.0
    words = (*fault.command, *fault.words)
    running = stage.start(folder, fault, words, True, stage.root / f"{name}-logs" / "first", write)
    if fault.outside is not None:
        running.whole_seconds = seconds
        fault.outside(running)
    kills = write is not None and write[0].what.startswith("kill")
    if write is not None and kills:
        running.wait_rank(write[0].rank)
        running.kill()
    ended = running.wait()
    if write is not None and kills:
        ended = [ended[write[0].rank]]  # the others may have noticed
    first = fault.ending.first if isinstance(fault.ending, Resumes) else fault.ending
    check_end(stage, fault, first, folder, ended, before)
    return ended


def check_resumed(stage: Stage, fault: Fault, folder: Path, name: str, url: str) -> None:
    """The run that resumes it."""
    assert isinstance(fault.ending, Resumes)
    plain = without_fault(fault)
    if fault.ending.mend is None:
        for path in fault.files:
            (folder / path).unlink()
        write_files(folder, plain, url)
    else:
        fault.ending.mend(folder)
    resume = RESUME if list((folder / "out").glob("checkpoint-*")) else ()
    words = (*fault.command, *(word for word in fault.words if word not in RESUME), *resume)
    ended = stage.start(folder, plain, words, False, stage.root / f"{name}-logs" / "resumed").wait()
    check_end(stage, plain, Survived(), folder, ended, set())
    assert step_logs(folder) == step_logs(stage.whole(fault))
    assert record_of(folder) == record_of(stage.whole(fault)), "another record"


def check_end(
    stage: Stage, fault: Fault, ending: Ending, folder: Path, ended: Sequence[Ended], before: set[str]
) -> None:
    said = "\n".join(f"--- rank {rank}, exit {one.code}\n{one.printed}" for rank, one in enumerate(ended))
    for one in ended:
        assert not one.hung, f"it hangs\n{said}\n{one.stack}"
        assert "Traceback" not in one.printed, said
    check_ending(stage, fault, ending, folder, ended, said)
    check_nothing_leaks(folder, said)
    problems = problems_of(folder, before)
    assert not problems, f"{problems}\n{said}"
    if all(one.code == 0 for one in ended) and fault.command[0] == "train" and fault.words[:1] != ("--help",):
        check_trained(folder, stage.ground)


def check_ending(stage: Stage, fault: Fault, ending: Ending, folder: Path, ended: Sequence[Ended], said: str) -> None:
    """That it ended as the fault says."""
    match ending:
        case Either(endings):
            for code in sorted({one.code for one in ended}):  # one rank may have ended before the fault came
                found = next((one for one in endings if code == exit_code(one)), endings[0])
                check_ending(stage, fault, found, folder, [one for one in ended if one.code == code], said)
        case ByRank(endings):
            for one, own in zip(ended, endings, strict=True):
                check_ending(stage, fault, own, folder, [one], said)
        case Survived(words, like):
            assert all(one.code == 0 for one in ended), said
            check_words(words, said)
            if like is not ANY:
                whole = stage.whole(fault if like is None else fault.but(options=like))
                assert weights_hash(folder / "out") == weights_hash(whole / "out"), f"other weights\n{said}"
        case OneLine(code, words) | Stops(code, words):
            assert {one.code for one in ended} == {code}, said
            check_words(words, said)
            lines = [[line for line in one.stderr.splitlines() if line.startswith("error:")] for one in ended]
            assert all(len(of_rank) <= 1 for of_rank in lines), said
            assert any(lines) == isinstance(ending, OneLine), said
        case Killed(signal):
            assert {one.code for one in ended} == {-signal}, said


def exit_code(ending: Survived | OneLine | Stops | Killed) -> int:
    """The one that an ending has."""
    match ending:
        case Survived():
            return 0
        case Killed(signal):
            return -signal
        case _:
            return ending.code


def check_nothing_leaks(folder: Path, said: str) -> None:
    """No secret is told, no code of a file has run, and the model card holds no HTML of others."""
    assert not (folder / "owned").exists(), f"code of a file has run\n{said}"
    assert SECRET not in said, said
    for path in (folder / "out").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), f"{path} holds a secret\n{said}"
    for card in (folder / "out").rglob("README.md"):
        assert "<script" not in card.read_text(), f"HTML in {card}\n{said}"


def check_words(words: Sequence[str], said: str) -> None:
    missing = [word for word in words if word not in said]
    assert not missing, f"not said: {missing}\n{said}"


def check_trained(folder: Path, ground: Path) -> None:
    """The final model loads, is finite and is not the one that the run began with."""
    files = list((folder / "out").glob("*.safetensors"))
    assert files, "no final model"
    start = load_file(ground / "policy" / "model.safetensors")
    for file in files:
        tensors = load_file(file)
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values()), f"{file} is not finite"
        if tensors.keys() == start.keys():
            assert any(not torch.equal(tensor, start[name]) for name, tensor in tensors.items()), "nothing was trained"


def problems_of(folder: Path, before: set[str]) -> list[str]:
    """What is wrong with the checkpoints that the run has made."""
    found = []
    for checkpoint in sorted((folder / "out").glob("checkpoint-*")):
        if checkpoint.name not in before and (problem := problem_of(checkpoint)):
            found.append(f"{checkpoint.name}: {problem}")
    return found


def problem_of(checkpoint: Path) -> str | None:
    """Why a folder is no whole, finite checkpoint."""
    names = {path.name for path in checkpoint.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        return "no weights"
    missing = {"optimizer.pt", "scheduler.pt", "trainer_state.json"} - names
    if missing:
        return f"without {sorted(missing)}"
    for path in checkpoint.iterdir():
        try:
            load(path)
        except (ValueError, RuntimeError, OSError, EOFError, SafetensorError) as error:
            return f"{path.name}: {error}"
    return None


def load(path: Path) -> Any:
    """Reads a file of a checkpoint.

    Raises:
        ValueError, RuntimeError, OSError, EOFError, SafetensorError: it is torn, or holds what is not finite.
    """
    if path.suffix == ".safetensors":
        if not all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()):
            raise ValueError("not finite")
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text())


def step_logs(folder: Path) -> list[dict[str, Any]]:
    """The log entries of steps, without times."""
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [
        {
            name: _comparable(value)
            for name, value in log.items()
            if not name.startswith(("time/", "perf/")) and name != "judge/seconds"
        }
        for log in history
        if "pairs/count" in log
    ]


def record_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of metrics of steps and the groups in a run folder, without times. Each frame has to be readable."""
    run = RunFolder(folder / "out")
    rows = [row for row in run.metrics().rows if "pairs/count" in row]
    kept = [{k: v for k, v in row.items() if not k.startswith((*TIMES, "time", "restored"))} for row in rows]
    return kept, [_without_seconds(group) for at in run.all_frames() for group in run.groups(at)]


def _without_seconds(value: Any) -> Any:
    """A group without how long a judge took."""
    if isinstance(value, dict):
        return {name: _without_seconds(item) for name, item in value.items() if name != "seconds"}
    return [_without_seconds(item) for item in value] if isinstance(value, list) else value


def _comparable(value: Any) -> Any:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value
