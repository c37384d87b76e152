"""The identity of a run: compared with that of a checkpoint before it is resumed, and kept in its own checkpoints."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.choice import AUTO
from online_dpo.checkpoints.folders import by_age, remove
from online_dpo.checkpoints.identity import (
    BLOCK,
    compared_options,
    differences,
    gone_on_anyway,
    identity_of,
    is_over,
    of_other_runs,
    refusal,
    taken,
)
from online_dpo.checkpoints.manifest import manifest_of
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import CheckpointError

logger = logging.getLogger(__name__)


class RunIdentity:
    """What a run computes with: its options, and facts about its models, data and scorers.

    ``differs`` says whether the checkpoint that was resumed is of a run that computed with something else.

    Args:
        versions: those of the packages that compute.
    """

    def __init__(self, args: OnlineDPOConfig, versions: Mapping[str, str]) -> None:
        self._args, self._versions = args, versions
        self._options: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._later: dict[str, Callable[[], Any]] = {}
        self._ids: set[str] = set()
        self._id = ""
        self.differs = False

    def add(self, **facts: Any) -> None:
        """Adds facts; a function is called when the fact is needed for the first time."""
        for name, fact in facts.items():
            (self._later if callable(fact) else self._facts)[name] = fact

    def begin(self, checkpoint: str | None) -> None:
        """Begins a run: it starts anew, or goes on from a checkpoint.

        Raises:
            CheckpointError: the checkpoint is of a run that computed with something else, or the run's folder holds
                checkpoints of another run.
        """
        self._options = options_of(self._args)
        self.differs = False
        if checkpoint is None:
            self._id = uuid.uuid4().hex
        else:
            self._compare(Path(checkpoint))
        run_dir = Path(str(self._args.output_dir))
        if checkpoint is None or Path(checkpoint).absolute().parent != run_dir.absolute():
            self._take(run_dir)
        self._ids.add(self._id)

    def _compare(self, folder: Path) -> None:
        saved = identity_of(folder)
        self._id = uuid.uuid4().hex if saved is None else str(saved.get("id"))
        if saved is None:
            logger.warning(
                "%s does not say what its run computed with, so nothing could be compared with this run: an older "
                "version of online-dpo wrote it, or another program.",
                folder,
            )
            return
        if different := differences(_flat(saved), _flat(self.block())):
            if not self._args.resume_anyway:
                raise CheckpointError(refusal(folder, different))
            self.differs = True
            logger.warning("%s", gone_on_anyway(folder, different))
        manifest = manifest_of(folder)
        assert manifest is not None  # it holds the identity
        if others := differences(manifest.versions, self._versions):
            logger.warning("%s was computed with other versions, so results may differ: %s.", folder, "; ".join(others))

    def _take(self, run_dir: Path) -> None:
        others = of_other_runs(run_dir, {*self._ids, self._id})
        if others and not self._args.overwrite_output_dir:
            _check_repeats(run_dir, others, self.block())
            logger.warning(
                "%s holds checkpoints of an earlier run with the same settings, which is over: this one starts anew "
                "and replaces them as it saves its own.",
                run_dir,
            )
        elif self._args.should_save:
            for folder in others:
                remove(folder)

    @property
    def origin(self) -> tuple[str, bool]:
        """What the first process knows of where the run comes from: its id, and whether the checkpoint differs."""
        return self._id, self.differs

    def follow(self, origin: tuple[str, bool]) -> None:
        """Takes up what the first process has found; `begin` is called there alone."""
        self._id, self.differs = origin
        self._options = options_of(self._args)

    def block(self) -> dict[str, Any]:
        """Returns the identity as a checkpoint holds it."""
        for name, fact in list(self._later.items()):
            self._facts[name] = fact()
            del self._later[name]
        return {"id": self._id, "options": self._options, "facts": self._facts}

    def extra(self) -> dict[str, Any]:
        """Returns the block for the manifest of a checkpoint."""
        return {BLOCK: self.block()}


def options_of(args: OnlineDPOConfig) -> dict[str, Any]:
    """Returns the options of a configuration that are compared, with the name of its engine."""
    return compared_options(_with_file(args.to_dict()), args.world_size) | {"engine": args.engine_name}


def _with_file(options: dict[str, Any]) -> dict[str, Any]:
    """Options with what the file says that configures DeepSpeed, in place of its name."""
    given = options.get("deepspeed")
    return options | ({"deepspeed": json.loads(Path(given).read_text())} if isinstance(given, str) else {})


def check_options(resume: str | bool | None, args: OnlineDPOConfig) -> None:
    """Compares options with those of a checkpoint's run, before any model is loaded; `RunIdentity` compares the rest.

    Args:
        resume: the value of ``resume_from_checkpoint``: a folder, anything that means the newest checkpoint, or
            ``None`` for a run that starts anew.

    Raises:
        CheckpointError: they differ, and nothing in the options says that they may.
    """
    run_dir, options = Path(str(args.output_dir)), {"options": options_of(args)}
    if not resume:
        others = of_other_runs(run_dir, set())
        if others and not args.overwrite_output_dir:
            _check_repeats(run_dir, others, options)
        return
    newest = resume is True or resume == AUTO
    for folder in by_age(run_dir)[-1:] if newest else [Path(str(resume))]:
        saved = identity_of(folder)
        if saved is None or args.resume_anyway:
            return
        if different := differences(_flat(saved), _flat(options)):
            raise CheckpointError(refusal(folder, different))


def _check_repeats(run_dir: Path, others: list[Path], own: Mapping[str, Any]) -> None:
    """Lets a run start anew where all checkpoints are of one that is over and computed the same."""
    newest = (by_age(run_dir) or others)[-1]
    saved = identity_of(newest)
    different = None if saved is None else differences(_flat(saved), _flat(own))
    if saved is None or different or not is_over(newest):
        raise CheckpointError(taken(run_dir, others, different))


def _flat(block: Mapping[str, Any]) -> dict[str, Any]:
    """Options and facts of a block side by side."""
    options, facts = block.get("options"), block.get("facts")
    return {**(options if isinstance(options, dict) else {}), **(facts if isinstance(facts, dict) else {})}
