"""Attention that hands out its log-sum-exp: one op over whatever kernels are installed (arXiv 2205.14135)."""

from __future__ import annotations

from prfl_fast.ops.attention.choice import attention_provider
from prfl_fast.ops.attention.op import attention

__all__ = ["attention", "attention_provider"]
