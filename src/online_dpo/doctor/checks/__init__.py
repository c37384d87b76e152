"""The checks of this package, one file for each subject. The order of the imports is that of the report."""

from online_dpo.doctor.checks import (  # noqa: F401  isort: skip
    versions,
    settings,
    files,
    device,
    disk,
    tokens,
    template,
    prompts,
    memory,
    servers,
    models,
    samples,
    rewards,
    judges,
    timing,
)
