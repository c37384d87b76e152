"""The checks of this package, one file for each subject. They are imported when a run is examined."""

ORDER = (
    "versions",
    "settings",
    "files",
    "device",
    "tokens",
    "prompts",
    "template",
    "disk",
    "memory",
    "servers",
    "models",
    "samples",
    "rewards",
    "judges",
    "timing",
)
"""The files, in the order of the report."""
