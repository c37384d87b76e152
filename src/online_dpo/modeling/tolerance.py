"""How far numbers may lie apart and still be the same but for rounding, by type."""

from __future__ import annotations

import torch

ROUNDING = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Difference in nats a token, mean over a completion, that rounding alone may make between two right ways to compute
log-probabilities.
"""
MOST_ROUNDING = 4
"""Some models round more coarsely than that, but not by more than this factor."""
