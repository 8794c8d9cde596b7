"""The ops that the rest is built of, each a plain function over tensors."""

from __future__ import annotations

from prfl_fast.ops.attention import attention, attention_provider
from prfl_fast.ops.backends import backend
from prfl_fast.ops.gated_residual import gated_residual, gated_residual_norm
from prfl_fast.ops.modulated_norm import modulated_norm
from prfl_fast.ops.qk_norm_rope import qk_norm_rope
from prfl_fast.ops.query_pool import query_pool
from prfl_fast.ops.solver_step import StepCoefficients, solver_step, solver_step_transpose

__all__ = [
    "StepCoefficients",
    "attention",
    "attention_provider",
    "backend",
    "gated_residual",
    "gated_residual_norm",
    "modulated_norm",
    "qk_norm_rope",
    "query_pool",
    "solver_step",
    "solver_step_transpose",
]
