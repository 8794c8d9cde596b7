"""Attention of a few learned queries over many tokens in passes over the raw tokens (arXiv 1805.02867)."""

from __future__ import annotations

from prfl_fast.ops.query_pool.group import merge_pools
from prfl_fast.ops.query_pool.op import fold_query, partial_pool, query_pool

__all__ = ["fold_query", "merge_pools", "partial_pool", "query_pool"]
