"""What `modulated_norm`, `gated_residual` and `gated_residual_norm` share: modulation, formulas, torch ops."""

from __future__ import annotations

# Registers the torch ops.
from prfl_fast.ops.rows import registration as _registration  # noqa: F401
