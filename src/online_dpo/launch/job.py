"""`Job`: what is started on a cluster, as far as it is known before the cluster is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from online_dpo.checkpoints.choice import problem_of_named
from online_dpo.checkpoints.folders import by_age, located
from online_dpo.checkpoints.manifest import FILE
from online_dpo.checkpoints.needed import Needs
from online_dpo.launch.failures import ClusterError
from online_dpo.launch.settings import RaySettings
from online_dpo.launch.worker import Facts, own_version


@dataclass(frozen=True)
class Job:
    """A run that is to be started on a cluster.

    ``words`` are those of the command after the run file, without the settings of Ray. ``variables`` are passed on to
    all processes. ``paths`` have to be seen by all that train, and ``model`` by the servers as well, if it is a folder.
    ``needs`` says which checkpoints the run can go on from.
    """

    settings: RaySettings
    run_file: Path | None
    words: Sequence[str]
    folder: str
    output_dir: Path
    model: str
    revision: str | None
    trust_remote_code: bool
    paths: Sequence[str]
    needs: Needs
    variables: Mapping[str, str] = field(repr=False)

    def check(self, facts: Facts) -> None:
        """Check that a machine can do its part.

        Raises:
            ClusterError: it has another version of this package, or does not see the run's files.
        """
        if facts.version != own_version():
            raise ClusterError(
                f"{facts.address} has online-dpo {facts.version}, and this machine {own_version()}. Install the same "
                "on all machines."
            )
        if facts.missing:
            raise ClusterError(
                f"{facts.address} does not see {', '.join(facts.missing)}. All machines read and write the same paths: "
                "put the run file, its data and models and `output_dir` on a disk that they share."
            )


class OwnCheckpoints:
    """Tells the checkpoints that a run has written from those that lay in its folder before it was started."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before = self._now()

    def newest(self) -> Path | None:
        """The newest whole one of this run."""
        before = self._before
        new = [folder for folder, stamp in self._now().items() if before.get(folder) != stamp]
        return next((folder for folder in reversed(new) if problem_of_named(folder, self._job.needs) is None), None)

    def _now(self) -> dict[Path, int]:
        """Each checkpoint, in the order in which they were written, with the time of its manifest."""
        folders = by_age(self._job.output_dir)
        return {folder: (located(folder) / FILE).stat().st_mtime_ns for folder in folders}
