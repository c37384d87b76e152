"""How the record of a run goes on when the run is resumed: what is said of it, and what is made up for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from online_dpo.runs import events
from online_dpo.runs.appending import GrowingFile
from online_dpo.runs.cutting import SUMMARY, Cut
from online_dpo.runs.directory import json_line
from online_dpo.runs.layout import METRICS
from online_dpo.training.display.figures import evaluation_prefix


def resumed_events(checkpoint: Path, cut: Cut, restored: int, passed_over: str) -> list[events.Event]:
    """The events that say how a run goes on."""
    text = f"The run goes on from {checkpoint.name}" + (f" ({passed_over})." if passed_over else ".")
    facts = {"from": str(checkpoint), "rows_cut": cut.rows, "frames_cut": cut.frames, "passed_over": passed_over}
    told = [events.Event("resume", text, facts)]
    if restored:
        text = f"{restored} rows of metrics were not here, and come from the checkpoint."
        told.append(events.Event("record", text, {"restored": restored}))
    if cut.damaged:
        text = f"These files are damaged in the middle, and go on after it: {', '.join(cut.damaged)}."
        told.append(events.Event("record", text, {"damaged": cut.damaged}))
    return told


def step_in(checkpoint: Path) -> int:
    """The step of a checkpoint, whose folder may have any name."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())["global_step"]


def restore_metrics(folder: Path, checkpoint: Path, last: int) -> int:
    """Adds the rows of metrics after step ``last`` that the checkpoint has and the record has not: it was made without
    a run folder, in another folder, or while the record could not be written. Returns how many.
    """
    state = checkpoint / TRAINER_STATE_NAME
    logs = [log for log in json.loads(state.read_bytes())["log_history"] if isinstance(log.get("step"), int)]
    logs = [log for log in logs if log["step"] > last]
    rows = [{**metrics_row(log["step"], log), "time": state.stat().st_mtime, "restored": True} for log in logs]
    if rows:
        file = GrowingFile(folder / METRICS)
        file.add(b"".join(map(json_line, rows)))
        file.close()
    return len(rows)


def metrics_row(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """A log as a row of metrics, but for its time."""
    kind = "eval" if evaluation_prefix(logs) and SUMMARY not in logs else "train"
    return {"step": step, "kind": kind, **{name: value for name, value in logs.items() if name != "step"}}
