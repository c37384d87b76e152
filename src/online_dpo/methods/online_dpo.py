"""Online DPO (Guo et al. 2024, arXiv 2402.04792): all completions of a prompt are the policy's."""

from __future__ import annotations

from online_dpo.methods.base import Method, method


@method("online_dpo")
class OnlineDPO(Method):
    """The default method; it overrides nothing."""
