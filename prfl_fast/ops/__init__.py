"""The ops that the rest is built of, each a plain function over tensors."""

from __future__ import annotations

from prfl_fast.ops.solver_step import StepCoefficients, solver_step, solver_step_transpose

__all__ = ["StepCoefficients", "solver_step", "solver_step_transpose"]
