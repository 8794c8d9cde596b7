"""Attention, backward, from output and log-sum-exp (arXiv 2205.14135): no atomics, so the same bits in every run.

    delta = sum(d_out out) - d_lse
    w = exp(scale q k^T - lse)             dv = w^T d_out
    ds = w (d_out v^T - delta)             dk = scale ds^T q,  dq = scale ds k

One kernel goes over the queries of a tile of keys, one over the keys of a tile of queries. Where keys are too few to
fill the chip, the queries are split, and the parts of dk and dv, in float32, are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfl_fast.kernels.attention_tiles import place, read_tile, wide, write_tile


@triton.jit
def attention_delta_kernel(
    out, d_out, d_lse, delta, out_strides, d_strides, queries, heads,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, HAS_D_LSE: tl.constexpr,
):  # fmt: skip
    """``delta`` ``[B, H, Lq]``, float32."""
    tile, b, h = place(tl.program_id(0), tl.cdiv(queries, BLOCK_M), heads)
    begin = wide(tile * BLOCK_M)
    left = queries - tile * BLOCK_M
    out += b * out_strides[0] + h * out_strides[2] + begin * out_strides[1]
    d_out += b * d_strides[0] + h * d_strides[2] + begin * d_strides[1]
    made = read_tile(out, out_strides[1], left, BLOCK_M, D, COLUMNS, True).to(tl.float32)
    d = read_tile(d_out, d_strides[1], left, BLOCK_M, D, COLUMNS, True).to(tl.float32)
    row = tl.arange(0, BLOCK_M)
    at = (b * heads + h) * queries + begin + row
    level = tl.sum(made * d, axis=1)
    if HAS_D_LSE:
        level -= tl.load(d_lse + at, mask=row < left, other=0.0)
    tl.store(delta + at, level, mask=row < left)


@triton.jit
def _over_queries(
    dk, dv, key, value, q, d_out, lse, delta, q_stride, d_stride, first, stop, queries, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Sums of dk (without the scale) and dv over queries ``first`` to ``stop``."""
    log2_e: tl.constexpr = 1.4426950408889634
    row = tl.arange(0, BLOCK_M)
    for start in range(first, stop, BLOCK_M):
        left = queries - start
        query = read_tile(q + wide(start) * q_stride, q_stride, left, BLOCK_M, D, COLUMNS, TAIL)
        d = read_tile(d_out + wide(start) * d_stride, d_stride, left, BLOCK_M, D, COLUMNS, TAIL)
        if TAIL:
            # Weights of queries that are not there: exp2(-inf).
            top = tl.load(lse + start + row, mask=row < left, other=float("inf"))
            level = tl.load(delta + start + row, mask=row < left, other=0.0)
        else:
            top = tl.load(lse + start + row)
            level = tl.load(delta + start + row)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(scores * factor - (top * log2_e)[None, :])
        dv = tl.dot(weights.to(d.dtype), d, dv, input_precision="ieee")
        d_weights = tl.dot(value, tl.trans(d), input_precision="ieee")
        d_scores = weights * (d_weights - level[None, :])
        dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, q_strides, k_strides, v_strides, d_strides, queries, keys, heads, samples,
    per_split, scale, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv ``[splits, B, Lk, H, D]`` of one tile of keys over one run of ``per_split`` queries.

    ``per_split`` is a multiple of ``BLOCK_M``; the grid is (key tiles x samples x heads, splits).
    """
    tile, b, h = place(tl.program_id(0), tl.cdiv(keys, BLOCK_N), heads)
    split = tl.program_id(1)
    begin = wide(tile * BLOCK_N)
    left = keys - tile * BLOCK_N
    q += b * q_strides[0] + h * q_strides[2]
    d_out += b * d_strides[0] + h * d_strides[2]
    k += b * k_strides[0] + h * k_strides[2] + begin * k_strides[1]
    v += b * v_strides[0] + h * v_strides[2] + begin * v_strides[1]
    lse += (b * heads + h) * queries
    delta += (b * heads + h) * queries
    # Keys that are not there are zeros and give rows that nobody stores.
    key = read_tile(k, k_strides[1], left, BLOCK_N, D, COLUMNS, True)
    value = read_tile(v, v_strides[1], left, BLOCK_N, D, COLUMNS, True)
    sum_k = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    sum_v = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    first = split * per_split
    stop = tl.minimum(first + per_split, queries)
    whole = stop // BLOCK_M * BLOCK_M  # at least first, a multiple too
    sum_k, sum_v = _over_queries(
        sum_k, sum_v, key, value, q, d_out, lse, delta, q_strides[1], d_strides[1], first, whole, queries, factor,
        D, COLUMNS, BLOCK_M, False,
    )  # fmt: skip
    sum_k, sum_v = _over_queries(
        sum_k, sum_v, key, value, q, d_out, lse, delta, q_strides[1], d_strides[1], whole, stop, queries, factor,
        D, COLUMNS, BLOCK_M, True,
    )  # fmt: skip
    width = heads * D
    at = ((wide(split) * samples + b) * keys + begin) * width + h * D
    write_tile(dk + at, width, left, sum_k * scale, BLOCK_N, D, COLUMNS)
    write_tile(dv + at, width, left, sum_v, BLOCK_N, D, COLUMNS)


@triton.jit
def _over_keys(
    dq, query, d, top, level, k, v, k_stride, v_stride, first, stop, keys, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Sum of dq (without the scale) over keys ``first`` to ``stop``."""
    for start in range(first, stop, BLOCK_N):
        left = keys - start
        key = read_tile(k + wide(start) * k_stride, k_stride, left, BLOCK_N, D, COLUMNS, TAIL)
        value = read_tile(v + wide(start) * v_stride, v_stride, left, BLOCK_N, D, COLUMNS, TAIL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        power = scores * factor - top[:, None]
        if TAIL:
            # The score of a key that is not there is 0, and its weight may be infinite.
            power = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], power, float("-inf"))
        weights = tl.exp2(power)
        d_weights = tl.dot(d, tl.trans(value), input_precision="ieee")
        d_scores = weights * (d_weights - level[:, None])
        dq = tl.dot(d_scores.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit
def attention_dq_kernel(
    q, k, v, d_out, lse, delta, dq, q_strides, k_strides, v_strides, d_strides, queries, keys, heads, scale, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq ``[B, Lq, H, D]`` of one tile of queries."""
    log2_e: tl.constexpr = 1.4426950408889634
    tile, b, h = place(tl.program_id(0), tl.cdiv(queries, BLOCK_M), heads)
    begin = wide(tile * BLOCK_M)
    left = queries - tile * BLOCK_M
    q += b * q_strides[0] + h * q_strides[2] + begin * q_strides[1]
    d_out += b * d_strides[0] + h * d_strides[2] + begin * d_strides[1]
    k += b * k_strides[0] + h * k_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    query = read_tile(q, q_strides[1], left, BLOCK_M, D, COLUMNS, True)
    d = read_tile(d_out, d_strides[1], left, BLOCK_M, D, COLUMNS, True)
    row = tl.arange(0, BLOCK_M)
    at = (b * heads + h) * queries + begin + row
    top = tl.load(lse + at, mask=row < left, other=float("inf")) * log2_e
    level = tl.load(delta + at, mask=row < left, other=0.0)
    total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    total = _over_keys(
        total, query, d, top, level, k, v, k_strides[1], v_strides[1], 0, whole, keys, factor,
        D, COLUMNS, BLOCK_N, False,
    )  # fmt: skip
    total = _over_keys(
        total, query, d, top, level, k, v, k_strides[1], v_strides[1], whole, keys, keys, factor,
        D, COLUMNS, BLOCK_N, True,
    )  # fmt: skip
    width = heads * D
    write_tile(dq + (b * queries + begin) * width + h * D, width, left, total * scale, BLOCK_M, D, COLUMNS)


@triton.jit
def attention_add_kernel(parts, total, count, splits, BLOCK: tl.constexpr):
    """``total`` ``[count]``: the sum of ``parts`` ``[splits, count]``, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        value += tl.load(parts + wide(split) * count + at, mask=at < count, other=0.0)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=at < count)
