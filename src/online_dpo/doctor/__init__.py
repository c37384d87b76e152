"""`online-dpo doctor`: checks of a run before it costs anything. Each says what was found and what to change."""

from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check

__all__ = ["Finding", "check", "ok", "problem", "warning"]
