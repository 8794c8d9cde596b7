"""The solver step on Triton: registration; the kernels are imported when they are first called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prfl_fast.ops.solver_step import registration


def _step(*arguments: Any) -> list[Tensor]:
    from prfl_fast.kernels import solver_step

    results: list[Tensor] = solver_step.step(*arguments)
    return results


def _transpose(*arguments: Any) -> list[Tensor]:
    from prfl_fast.kernels import solver_step

    results: list[Tensor] = solver_step.transpose(*arguments)
    return results


def implement() -> None:
    """Registers the ops of the Triton backend."""
    registration.implement("_triton", _step, _transpose)
