from __future__ import annotations

import signal

from faults.damage import removed, stopped_after
from faults.harness import Fault, Killed, OneLine, Resumes, Stops, Survived, scorer
from faults.injection import kills, sends

FAULTS = [
    Fault("none", "no fault", Survived()),
    Fault("none", "no fault two ranks", Survived(), processes=2),
    Fault(
        "reward function",
        "raises in step 3",
        Resumes(OneLine(1, "ConnectionError", "away")),
        files={"feedback.py": scorer("if calls == 3: raise ConnectionError('away')")},
    ),
    Fault("run file", "no such method", OneLine(2, "`method`", "nash_md"), options={"method": "nash_dm"}),
    Fault(
        "checkpoint",
        "no optimizer.pt",
        OneLine(2, "optimizer.pt", "checkpoint-2"),
        options={"save_steps": 2},
        trained={},
        prepare=stopped_after(2, removed("out/checkpoint-2/optimizer.pt")),
        words=("--resume_from_checkpoint", "out/checkpoint-2"),
    ),
    Fault(
        "signal",
        "SIGTERM in step 2",
        Resumes(Stops(143, "SIGTERM", "checkpoint-2")),
        inject=lambda child: child.at_step(2, sends(signal.SIGTERM)),
    ),
    Fault(
        "signal",
        "SIGINT in step 2",
        Resumes(Stops(130, "checkpoint-2")),
        inject=lambda child: child.at_step(2, sends(signal.SIGINT)),
    ),
    Fault(
        "kill",
        "in step 3",
        Resumes(Killed(9)),
        options={"save_steps": 1},
        inject=lambda child: child.at_step(3, kills()),
    ),
]
