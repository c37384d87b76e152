"""The errors of runs on a cluster."""

from __future__ import annotations

from online_dpo.errors import OnlineDPOError


class ClusterError(OnlineDPOError, RuntimeError):
    """A run could not be started on a cluster. The message says what is missing and what to do."""


class ServerFailedError(OnlineDPOError, RuntimeError):
    """A vLLM server of a run could not be started, or was lost too often. The message has the end of its log.

    ``wrong_input``: it refused the words that it was given.
    """

    def __init__(self, message: str, wrong_input: bool = False) -> None:
        super().__init__(message)
        self.wrong_input = wrong_input


class MachinesLostError(OnlineDPOError, RuntimeError):
    """Machines were lost while a run trained, and the rest of the cluster has no room for it. The message says what is
    missing.
    """


class WorkerLost(Exception):
    """A worker is gone: its machine, or its process. The message reads on from `The worker of rank 1 is lost: `."""
