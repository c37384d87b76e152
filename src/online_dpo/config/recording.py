"""Fields of the configuration that say what a run writes down of itself."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.config.checking import check_numbers, warn_ignored
from online_dpo.config.field_specs import documented

ALL, OFF = "all", "off"


@documented
@dataclass
class RecordingFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- record -----------------------------------------------------------------------------------------------------

    run_folder: bool | None = None
    """Write the run's settings, environment, metrics, events and completions into `output_dir`
    (docs/reference/run-folder.md).
    When not set: on for the command, off in Python.
    """

    log_completions: bool | int | str = "all"
    """With `run_folder`: of which prompts all completions are written with their scores, pairs and reasons. `all`
    (true), `off` (false), or how many prompts a step, over all processes.
    """

    num_completions_to_print: int | None = None
    """How many pairs of each log are shown under the progress of a run. When not set: 2 on a terminal and in a
    notebook, none in lines. At least 0; `log_completions: off` shows none.
    """

    log_completions_max_mb: int = 2000
    """Most megabytes that the files of completions may take together; above it the oldest are removed, and an event
    says so. At least 1.
    """


def check_recording(args: RecordingFields) -> None:
    """Check what is written down, and bring ``log_completions`` into one form: ``all``, ``off``, or a number.

    Raises:
        ValueError: a number is out of range, or a text is none of these.
    """
    given = args.log_completions
    args.log_completions = _amount(given)
    amount = args.log_completions
    checks = [
        (amount in (ALL, OFF) or (isinstance(amount, int) and amount >= 1), "log_completions", f"{ALL}, {OFF}, or a "
         "number of prompts a step, at least 1"),
        (
            args.num_completions_to_print is None or args.num_completions_to_print >= 0,
            *("num_completions_to_print", "at least 0"),
        ),
        (args.log_completions_max_mb >= 1, "log_completions_max_mb", "at least 1"),
    ]  # fmt: skip
    check_numbers(args, checks, {"log_completions": given})
    if args.run_folder is False:
        fields = {"log_completions": ALL, "log_completions_max_mb": RecordingFields.log_completions_max_mb}
        changed = [name for name, usual in fields.items() if getattr(args, name) not in (usual, OFF)]
        warn_ignored(changed, "without `run_folder`")


def _amount(value: bool | int | str) -> int | str:
    """What is asked for, as a text or a number; anything else as it is."""
    if isinstance(value, bool):
        return ALL if value else OFF
    if isinstance(value, str):
        word = value.strip().lower()
        of_bool = {"true": ALL, "yes": ALL, "on": ALL, "false": OFF, "no": OFF}
        return int(word) if word.isdecimal() else of_bool.get(word, word)
    return value
