"""The errors of runs on a cluster."""

from __future__ import annotations

from online_dpo.errors import OnlineDPOError


class ClusterError(OnlineDPOError, RuntimeError):
    """A run could not be started on a cluster. The message says what is missing and what to do."""


class ServerFailedError(OnlineDPOError, RuntimeError):
    """A vLLM server of a run could not be started, or was lost too often. The message has the end of its log."""


class WorkerLost(Exception):
    """A worker is gone: its machine, or its process. The message reads on from `The worker of rank 1 is lost: `."""
