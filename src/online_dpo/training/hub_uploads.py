"""What is pushed to the hub of a run's folder: its model, not the record of the run.

The record holds prompts and completions, the command and the machine. `transformers` uploads the whole folder, but for
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from transformers import trainer

from online_dpo.runs.layout import RECORD_PATTERNS


class ModelUploads:
    """The hub's interface, whose uploads of a folder leave out the record of a run.

    Args:
        api: the interface.
    """

    def __init__(self, api: HfApi) -> None:
        self._api = api

    def upload_folder(self, *, ignore_patterns: list[str] | None = None, **options: Any) -> Any:
        """As `HfApi.upload_folder`."""
        return self._api.upload_folder(ignore_patterns=[*(ignore_patterns or []), *RECORD_PATTERNS], **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)


@contextmanager
def without_record() -> Iterator[None]:
    """Inside, `transformers.Trainer` uploads no record of a run."""
    module: Any = trainer
    original = module.hf_api
    module.hf_api = lambda: ModelUploads(original())
    try:
        yield
    finally:
        module.hf_api = original
