"""Attention, forward: one tile of queries a program, its keys from first to last (arXiv 2205.14135, 2307.08691).

Scores live in base 2: ``exp(x) = exp2(x log2(e))``, with log2(e) inside the scale. Products of the inputs' dtype
(float32 as it is, without TF32), sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfl_fast.kernels.attention_tiles import place, read_tile, wide, write_tile


@triton.jit
def _over_keys(
    acc, total, high, query, k, v, k_stride, v_stride, first, stop, keys, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, NEGATIVE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys ``first`` to ``stop``; with ``TAIL``, tiles may reach behind the last key."""
    for start in range(first, stop, BLOCK_N):
        left = keys - start
        key = read_tile(k + wide(start) * k_stride, k_stride, left, BLOCK_N, D, COLUMNS, TAIL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if NEGATIVE:
            scores = -scores
        if TAIL:
            there = (tl.arange(0, BLOCK_N) < left)[None, :]
            top = tl.max(tl.where(there, scores, float("-inf")), axis=1)
        else:
            top = tl.max(scores, axis=1)
        above = tl.maximum(high, top * factor)
        power = scores * factor - above[:, None]
        if TAIL:
            # Before the exponential: the score of a key that is not there is 0, which may be far above the others.
            power = tl.where(there, power, float("-inf"))
        weights = tl.exp2(power)
        shrink = tl.exp2(high - above)
        total = total * shrink + tl.sum(weights, axis=1)
        value = read_tile(v + wide(start) * v_stride, v_stride, left, BLOCK_N, D, COLUMNS, TAIL)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        high = above
    return acc, total, high


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, queries, keys, heads, factor,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """``out`` ``[B, Lq, H, D]`` and ``lse`` ``[B, H, Lq]`` of one tile of queries.

    Strides are of sample, token and head. ``factor``: log2(e) times the size of the scale, ``NEGATIVE``: its sign.
    """
    tile, b, h = place(tl.program_id(0), tl.cdiv(queries, BLOCK_M), heads)
    begin = wide(tile * BLOCK_M)
    left = queries - tile * BLOCK_M
    q += b * q_strides[0] + h * q_strides[2] + begin * q_strides[1]
    k += b * k_strides[0] + h * k_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    query = read_tile(q, q_strides[1], left, BLOCK_M, D, COLUMNS, True)
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    acc, total, high = _over_keys(
        acc, total, high, query, k, v, k_strides[1], v_strides[1], 0, whole, keys, factor,
        D, COLUMNS, BLOCK_N, NEGATIVE, False,
    )  # fmt: skip
    acc, total, high = _over_keys(
        acc, total, high, query, k, v, k_strides[1], v_strides[1], whole, keys, keys, factor,
        D, COLUMNS, BLOCK_N, NEGATIVE, True,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    natural: tl.constexpr = 0.6931471805599453
    tl.store(lse + (b * heads + h) * queries + begin + row, (high + tl.log2(total)) * natural, mask=row < left)
    width = heads * D
    write_tile(out + (b * queries + begin) * width + h * D, width, left, acc / total[:, None], BLOCK_M, D, COLUMNS)
