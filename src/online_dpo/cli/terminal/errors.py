"""Errors as a command prints them: in one line, or with their traceback.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import sys
import traceback

from online_dpo.cli.runfile.entries import UsageError
from online_dpo.errors import OnlineDPOError, error_text, named_error

EXPLAINED = (ValueError, TypeError, OSError, ImportError, OnlineDPOError)
"""Exceptions whose message is clear without the name of their type."""


def report_error(error: BaseException, code: int, show_traceback: bool) -> int:
    """Print an error in one line, or its traceback, and return the exit code."""
    if isinstance(error, UsageError):
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    elif show_traceback:
        traceback.print_exception(error)
    else:
        message = error_text(error) if isinstance(error, EXPLAINED) else named_error(error)
        print(f"error: {message}\n(--traceback shows where it came from)", file=sys.stderr)
    return code
