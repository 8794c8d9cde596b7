"""Multi-head attention of a few learned queries over many tokens, without the keys and values of the tokens.

With Q queries and L tokens, Q far below L, the products that make K and V cost nearly everything and hold two tensors
of the size of the tokens. Both are linear, so they move to the other side of the softmax:

    scores[b, h, q, l] = q_h . (Wk_h x[b, l] + bk_h) / sqrt(d) = x[b, l] . (Wk_h^T q_h) / sqrt(d) + (a constant over l)
    sum_l p[l] (Wv_h x[b, l] + bv_h) = Wv_h (sum_l p[l] x[b, l]) + bv_h

(The constant cancels in the softmax, so the key bias has no influence: its gradient is exactly zero.) What is left is
one pass over the raw tokens, whose partial states merge exactly (Milakov and Gimelshein 2018, arXiv 1805.02867): that
is how token shards on several ranks become one result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from prfl_fast.ops.backends import choose
from prfl_fast.ops.query_pool import registration as _registration  # noqa: F401 (registers the torch ops)
from prfl_fast.ops.query_pool.group import merge_over, replicated

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fold_query(
    queries: Tensor, in_proj_weight: Tensor, in_proj_bias: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor:
    """Queries folded into the key projection, ``[H Q, C]`` in ``dtype``: ``Wk_h^T (Wq_h q + bq_h) / sqrt(d)``."""
    dim = queries.shape[1]
    head_dim = dim // num_heads
    bias = None if in_proj_bias is None else in_proj_bias[:dim].to(dtype)
    q = linear(queries.to(dtype), in_proj_weight[:dim].to(dtype), bias) / math.sqrt(head_dim)
    q = q.unflatten(1, (num_heads, head_dim)).transpose(0, 1)
    keys = in_proj_weight[dim : 2 * dim].to(dtype).unflatten(0, (num_heads, head_dim))
    return torch.bmm(q, keys).flatten(0, 1)


def partial_pool(x: Tensor, folded: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Softmax state of a set of tokens: weighted sums of the raw tokens and log-sum-exp of the scores.

    Args:
        x: ``[B, L, C]`` tokens, any float dtype and strides.
        folded: ``[H Q, C]`` from :func:`fold_query`; its dtype is that of the state.
        lengths: tokens that count per sample, from the front; the others are never read. A sample without any has
            sums of zero and a log-sum-exp of minus infinity.

    Returns:
        ``[B, H Q, C]`` and ``[B, H Q]``. Differentiable once, in both.

    Raises:
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    kernels = folded.dtype == torch.float32 and x.dtype in _TRITON_DTYPES
    backend = choose(x.device, ("triton", "reference") if kernels else ("reference",))
    sums, lse, _ = torch.ops.prfl_fast.query_pool_partial(x, folded, lengths, backend)
    return sums, lse


def _check(
    x: Tensor,
    queries: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    sharded: bool,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x: expected tokens [B, L, C], got shape {tuple(x.shape)}")
    dim = x.shape[2]
    if not x.shape[1] and not sharded:
        raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
    if queries.ndim != 2 or queries.shape[1] != dim or not queries.shape[0]:
        raise ValueError(f"queries: expected [Q, {dim}] with Q >= 1, got {tuple(queries.shape)}")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {dim} channels, got {num_heads}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("in_proj_weight", in_proj_weight, (3 * dim, dim)),
        ("in_proj_bias", in_proj_bias, (3 * dim,)),
        ("out_proj_weight", out_proj_weight, (dim, dim)),
        ("out_proj_bias", out_proj_bias, (dim,)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor, _ in [("x", x, ()), ("queries", queries, ()), *expected]:
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
        if name != "x" and tensor.dtype != queries.dtype:
            raise TypeError(f"{name}: expected the dtype of queries, {queries.dtype}, got {tensor.dtype}")


def _read_lengths(lengths: Tensor | Sequence[int], x: Tensor, sharded: bool) -> list[int]:
    if isinstance(lengths, Tensor) and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    least = 0 if sharded else 1
    if not isinstance(values, list) or len(values) != x.shape[0]:
        raise ValueError(f"lengths: expected one per sample ({x.shape[0]}), got {values}")
    if not all(isinstance(value, int) and least <= value <= x.shape[1] for value in values):
        raise ValueError(f"lengths: expected integers in {least}..{x.shape[1]}, got {values}")
    return values


def query_pool(
    x: Tensor,
    queries: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``torch.nn.MultiheadAttention`` (no dropout) of ``queries`` over the tokens, with no K and no V of the tokens.

    Parameters as in that module: rows 0..C of the input projection make the query, C..2C the key, 2C..3C the value.
    Computes in the wider of the dtypes of ``x`` and the parameters, in float32 at least (autocast does not reach
    inside); in plain torch, tokens of a narrower dtype are converted a bounded slice at a time. The Triton kernels
    multiply bfloat16 tokens by the sum of two bfloat16 numbers (16 bits) and are the same bits in every run; float64
    runs in plain torch. Kept for the backward: ``x`` itself and the scores ``[B, H Q, L]``. Differentiable once: a
    second derivative is refused with an error.

    Args:
        x: ``[B, L, C]`` tokens, any float dtype, any strides.
        queries: ``[Q, C]``, in the dtype of the other parameters.
        in_proj_weight: ``[3 C, C]``.
        in_proj_bias: ``[3 C]`` or None.
        out_proj_weight: ``[C, C]``.
        out_proj_bias: ``[C]`` or None.
        num_heads: a divisor of C.
        lengths: ``[B]`` integers: tokens that count per sample, from the front. The padding behind them is never read
            (it may hold NaN) and gets gradients of zero. A sample without tokens has no mean: an error. Read on the
            host: give them as a CPU tensor or a list to avoid a synchronisation.
        group: sequence parallelism: ``x`` is this rank's shard of the tokens (lengths may differ from rank to rank,
            zero too, and ``lengths`` counts in the shard), everything else is the same on every rank of the group.
            Every rank returns the same result and must go on to the same loss. The gradients are those of one device
            holding all tokens: of ``x``, the shard's part; of the parameters, the whole on every rank (averaged over
            ranks, as data parallelism does, they stay what they are).

    Returns:
        ``[B, Q, C]`` in the dtype of the parameters.

    Raises:
        ValueError: wrong shapes, devices, heads or lengths; no tokens.
        TypeError: wrong dtypes.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    sharded = group is not None
    _check(x, queries, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads, sharded)
    counts = None if lengths is None else _read_lengths(lengths, x, sharded)
    dim, count = x.shape[2], queries.shape[0]
    head_dim = dim // num_heads
    dtype = torch.promote_types(torch.promote_types(x.dtype, queries.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        folded = fold_query(queries, in_proj_weight, in_proj_bias, num_heads, dtype)
        sums, lse = partial_pool(x, folded if group is None else replicated(folded, group), counts)
        if group is not None:
            sums = merge_over(group, sums, lse)
        sums = sums.unflatten(1, (num_heads, count))
        values = in_proj_weight[2 * dim :].to(dtype).unflatten(0, (num_heads, head_dim))
        heads = torch.einsum("bhqc,hdc->bqhd", sums, values).flatten(2)
        if in_proj_bias is not None:
            heads = heads + in_proj_bias[2 * dim :].to(dtype)
        bias = None if out_proj_bias is None else out_proj_bias.to(dtype)
        return linear(heads, out_proj_weight.to(dtype), bias).to(queries.dtype)
