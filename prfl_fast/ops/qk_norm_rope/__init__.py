"""Norm of queries and keys and their rotary embedding (arXiv 2104.09864) in one pass over each."""

from __future__ import annotations

from prfl_fast.ops.qk_norm_rope.op import qk_norm_rope

__all__ = ["qk_norm_rope"]
