"""One solver step for fixed timesteps is a linear map: ``z' = A z + B m + C eps``.

``z`` is the solver's state (entry 0 is the latents x), ``m`` the network's output, ``eps`` the step's noise draws; A, B
and C are a handful of float64 numbers. So the op's adjoint needs the coefficients alone: no activation is saved.
"""

from __future__ import annotations

from prfl_fast.ops.solver_step.coefficients import StepCoefficients
from prfl_fast.ops.solver_step.op import as_mask, solver_step, solver_step_transpose

__all__ = ["StepCoefficients", "as_mask", "solver_step", "solver_step_transpose"]
