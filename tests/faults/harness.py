"""Faults in real command-line runs, and how each has to end. Start here to add one.

A fault is one line of a list called `FAULTS` in a file `cases_<kind>.py` of this folder (the catalogue finds the file):

    FAULTS = [
        Fault("reward function", "raises in step 3", Resumes(OneLine(1, "feedback.py", "ConnectionError", "away")),
              files={"feedback.py": scorer("if calls == 3: raise ConnectionError('away')")}),
        Fault("run file", "no such method", OneLine(2, "`method`", "nash_md"), options={"method": "nash_dm"}),
        Fault("checkpoint", "no optimizer.pt", OneLine(2, "optimizer.pt", "checkpoint-2"), options={"save_steps": 2},
              trained={}, prepare=stopped_after(2, removed("out/checkpoint-2/optimizer.pt")),
              words=("--resume_from_checkpoint", "out/checkpoint-2")),
        Fault("signal", "SIGTERM in step 2", Resumes(Stops(143, "SIGTERM", "checkpoint-2")),
              inject=lambda child: child.at_step(2, sends(signal.SIGTERM))),
    ]

What happens: a folder is filled with `policy/` (a tiny model), `data.jsonl`, `feedback.py` and `run.yaml` (`OPTIONS`
of `ground.py`, changed by ``options``), and `online_dpo.cli.main.main(["train", "run.yaml", *words])` runs in it, in a
fork of one process that has imported everything (`zygote.py`). Such a run takes a third of a second. Its end is then
compared with the fault's ending; whatever that is, these hold as well (`checks.py`): no traceback, no hang, every
checkpoint whole and finite, and exit code 0 only with a final model that loads, is finite and was trained.

Of `Fault`:
    options, files, environment, words: of the run. An option that is `None` is left out; a file's text may be bytes.
    command: the one that is run in place of `train run.yaml`.
    trained: a faultless run with ``options`` and these changes of them has been in the output folder before; such a
        run is made once, then copied. `stopped_after(step)` as ``prepare`` leaves its checkpoints up to a step.
    prepare(folder): anything else done to the folder before the run. `damage.py` has common things.
    inject(child): called in the child just before `main`; see `injection.py` for `child` and for actions.
    outside(running): called in the test while the run goes on. `running.wait_for(text)` waits until that is printed,
        `running.kill(signal)` sends a signal to all ranks or some.
    writes: `Writes("kill within")` and the like: the run is done again for every operation that writes into `out`, or
        for a part of them, and the fault is at that one.
    service: `Service(faulty, right)`, an HTTP server beside the run. `{url}` is its address: in options, files, words.
    processes: 2 starts two ranks (gloo).  limit: seconds until it counts as hanging.
    quick: `False` for the longer list, which `make test-faults` leaves out and `make test-faults-all` runs. Of many
        quick faults of a kind, the shorter list has only some (`catalogue.shorter_list`).

Endings:
    Survived(*words): exit 0, and the final weights equal, bit for bit, those of the same run without the fault (options
        alike; without a service, files and environment as they are without it), or with ``like={...}`` those of a
        faultless run with these options, or with ``like=ANY`` only the general checks.
    OneLine(code, *words): exactly one line on stderr begins with `error:`, and these words are in what was printed.
    Stops(code, *words): as that, without such a line: a run that was asked to stop.
    Killed(signal): ended by this signal.
    Either(*endings): on each rank the one of them that has its exit code, for faults that may come too late.
    ByRank(*endings): one for each rank.
    Resumes(first, mend=None): it ends as ``first`` says; then ``mend(folder)`` is called, which by default puts the
        files back as they are without the fault, and the same command with `--resume_from_checkpoint true` (without
        it, if there is no checkpoint yet) ends with the weights and the log of the uninterrupted run, each step once.

Run one: `python -m pytest tests/faults -k no_optimizer`. It prints what the run printed if it ended otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from faults.injection import Child
    from faults.runs import Running
    from support.endpoint import Answer

ANY: dict[str, Any] = {"any": True}
"""As ``like``: the weights need not equal another run's."""
SECRET = "sk-very-secret"
"""Where a fault has it, it must be in no file and no line of the run."""
RESUME = ("--resume_from_checkpoint", "true")


@dataclass(frozen=True)
class Survived:
    words: tuple[str, ...] = ()
    like: dict[str, Any] | None = None

    def __init__(self, *words: str, like: dict[str, Any] | None = None) -> None:
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "like", like)

    def __str__(self) -> str:
        how = "to the same weights" if self.like is None else "to other weights" if self.like is ANY else "as asked"
        return f"goes on, {how}"


@dataclass(frozen=True)
class _Ended:
    """An exit code, and words that are printed."""

    code: int
    words: tuple[str, ...]

    def __init__(self, code: int, *words: str) -> None:
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "words", words)


@dataclass(frozen=True, init=False)
class OneLine(_Ended):
    def __str__(self) -> str:
        return f"one line, exit {self.code}"


@dataclass(frozen=True, init=False)
class Stops(_Ended):
    def __str__(self) -> str:
        return f"stops, exit {self.code}"


@dataclass(frozen=True)
class Killed:
    signal: int

    def __str__(self) -> str:
        return "dies at once"


@dataclass(frozen=True)
class Either:
    endings: tuple[Survived | OneLine | Stops | Killed, ...]

    def __init__(self, *endings: Survived | OneLine | Stops | Killed) -> None:
        object.__setattr__(self, "endings", endings)

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(map(str, self.endings)))


@dataclass(frozen=True)
class ByRank:
    endings: tuple[OneLine | Killed, ...]

    def __init__(self, *endings: OneLine | Killed) -> None:
        object.__setattr__(self, "endings", endings)

    def __str__(self) -> str:
        return next(str(ending) for ending in self.endings if isinstance(ending, OneLine))


@dataclass(frozen=True)
class Resumes:
    first: OneLine | Stops | Killed | Survived | Either | ByRank
    mend: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return f"{self.first}; resumed to the same weights"


Ending = Survived | OneLine | Stops | Killed | Either | ByRank | Resumes


WriteFault = Literal["kill before", "kill within", "fail once", "fail from there"]


@dataclass(frozen=True)
class Writes:
    """A fault at an operation that writes into the output folder: opening, writing, syncing, renaming and so on.

    It happens at every ``every``-th operation, from the one with the number ``first``, each time in a run of its own.
    Killed within a write, half of it is there. What fails does so with ``error``. ``rank`` is the process that it
    happens to; the others are killed as soon as that one has been.
    """

    what: WriteFault
    first: int = 1
    every: int = 1
    error: int = errno.ENOSPC
    rank: int = 0


Respond = Callable[[dict[str, Any], int], "Answer"]


@dataclass(frozen=True)
class Service:
    """An HTTP server beside the run; ``{url}`` in options, files and environment is its address.

    ``faulty`` makes the answers to the run with the fault; ``right`` those to the runs without it and to the one that
    resumes. See `support/endpoint.py`.
    """

    faulty: Respond
    right: Respond


@dataclass(frozen=True)
class Fault:
    kind: str
    name: str
    ending: Ending
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] = ("train", "run.yaml")
    words: Sequence[str] = ()
    trained: dict[str, Any] | None = None
    prepare: Callable[[Path], None] | None = None
    inject: Callable[[Child], None] | None = None
    outside: Callable[[Running], None] | None = None
    writes: Writes | None = None
    service: Service | None = None
    processes: int = 1
    limit: float = 45.0
    quick: bool = True

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}".replace(" ", "_")

    def but(self, **changes: Any) -> Fault:
        """The same with changes."""
        return replace(self, **changes)


def scorer(before: str = "", returns: str = "scores", after: str = "") -> str:
    """A feedback.py whose `words` runs ``before``, where ``calls`` is the number of this call (from 1), makes
    ``scores`` as the one without a fault does, runs ``after``, and returns ``returns``.
    """
    indented = [f"    {line}" for text in (before, "scores = right(completions)", after) for line in text.splitlines()]
    return "\n".join(
        [
            "import os, signal, sys, threading, time",
            "calls = 0",
            "def right(completions):",
            "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]",
            "    return [sum(map(ord, text)) % 101 / 101 for text in texts]",
            "def words(completions, **columns):",
            "    global calls",
            "    calls += 1",
            *indented,
            f"    return {returns}",
            "",
        ]
    )
