"""Schedulers as solvers: pure functions of explicit state, as a table of coefficients or as they are."""

from __future__ import annotations

import warnings
from typing import Any

from prfl_fast.solvers.base import NonFiniteSchedulerError, NonlinearSchedulerError, Solver
from prfl_fast.solvers.cache import cached
from prfl_fast.solvers.scheduler import SchedulerSolver
from prfl_fast.solvers.table import SolverTable

__all__ = [
    "NonFiniteSchedulerError",
    "NonlinearSchedulerError",
    "SchedulerSolver",
    "Solver",
    "SolverTable",
    "make_solver",
]


def make_solver(scheduler: Any, num_inference_steps: int | None, *, start_step: int = 0, kind: str = "auto") -> Solver:
    """The solver for a diffusers scheduler, which stays as it is.

    A scheduler whose content was seen lately gets the same solver again.

    Args:
        scheduler: a diffusers scheduler.
        num_inference_steps: None takes the timesteps that the caller's ``set_timesteps`` left (custom sigmas, mu).
        start_step: the first step, with an empty history.
        kind: ``"table"``: a :class:`SolverTable`; ``"scheduler"``: a :class:`SchedulerSolver`; ``"auto"``: the table
            where the probe proves the steps linear, else the scheduler's own step, announced by a warning.

    Raises:
        NonlinearSchedulerError: ``"table"`` of a nonlinear scheduler.
        NonFiniteSchedulerError: the scheduler gives NaN or infinity with these settings; any kind.
        TypeError, ValueError: bad input, named.
    """
    if kind not in ("auto", "table", "scheduler"):
        raise ValueError(f"kind: expected 'auto', 'table' or 'scheduler', got {kind!r}")

    def table() -> SolverTable:
        return SolverTable.from_scheduler(scheduler, num_inference_steps, start_step=start_step)

    def own() -> SchedulerSolver:
        return SchedulerSolver(scheduler, num_inference_steps, start_step=start_step)

    if kind == "scheduler":
        return cached(SchedulerSolver, scheduler, num_inference_steps, start_step, own)
    try:
        return cached(SolverTable, scheduler, num_inference_steps, start_step, table)
    except NonFiniteSchedulerError:
        raise
    except NonlinearSchedulerError as error:
        if kind == "table":
            raise
        reason = str(error).split("; use ")[0]
    # stacklevel 1: a warning of this package, which `prfl-fast doctor` collects.
    warnings.warn(f"{reason}; its own step is kept in the graph instead of a table (slower, as exact)", stacklevel=1)
    return cached(SchedulerSolver, scheduler, num_inference_steps, start_step, own)
