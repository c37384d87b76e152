"""How a run ended, as its record says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["running", "finished", "stopped", "failed", "lost"]
"""``stopped`` by a signal; ``lost`` without a word: killed, or with its machine."""


@dataclass(frozen=True)
class End:
    """The end of a run: its exit code, what that means, and what has ended it.

    >>> End(code=143, message="SIGTERM stopped the run after step 12 of 100.").state
    'stopped'
    """

    code: int
    message: str = ""

    @property
    def state(self) -> State:
        """What the exit code means."""
        if self.code == 0:
            return "finished"
        return "stopped" if self.code > 128 else "failed"
