"""Attention pooling over raw tokens, forward and backward, in two passes over them (arXiv 1805.02867).

With w the folded queries (R rows, one per head and query), g the gradient of the sums and all of them in float32:

    s = w x^T          tile by tile, each with its own maximum and sum of exponentials, merged in one fixed order
    p = exp(s - lse)   sums = p x                                 parts over runs of tokens, added in one fixed order
    ds = p (g x^T - g . sums + dlse)     dw = ds x     dx = p^T g + ds^T w

Products run on tensor cores. bfloat16 tokens are exact there; the other factor goes in as the sum of two bfloat16
numbers, 16 bits instead of 8, which costs nothing where 8 rows fill half of the 16 that a tensor core takes. Where the
tokens are float16, products are three of TF32; where they are float32, they are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _stop(counts, b, length, HAS_COUNTS: tl.constexpr):
    """How many tokens of sample b count."""
    if HAS_COUNTS:
        return tl.load(counts + b)
    else:
        return length


@triton.jit
def pool_pieces_kernel(numbers, pieces, size, BLOCK: tl.constexpr):
    """``numbers`` (float32) as two bfloat16 numbers each: ``pieces`` ``[2, size]``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    number = tl.load(numbers + at, mask=inside, other=0.0)
    high = number.to(tl.bfloat16)
    tl.store(pieces + at, high, mask=inside)
    tl.store(pieces + size + at, (number - high.to(tl.float32)).to(tl.bfloat16), mask=inside)


@triton.jit
def _products(
    x, pieces, row_stride, first, stop, group, rows, piece_stride,
    C: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens from ``first`` on of a sample times the rows of a group: ``[BLOCK_L, ROWS]`` in float32."""
    # int64: tokens times their stride exceed 2^31.
    token = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
    tokens_at = x + (token * row_stride)[:, None]
    n = tl.arange(0, PIECES * ROWS)
    row = group * ROWS + n % ROWS
    pieces_at = (pieces + (n // ROWS) * piece_stride + row * C)[None, :]
    counted = (token < stop)[:, None]
    there = (row < rows)[None, :]
    acc = tl.zeros((BLOCK_L, PIECES * ROWS), tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        if C % BLOCK_C == 0:
            tile = tl.load(tokens_at + column[None, :], mask=counted, other=0.0)
            weight = tl.load(pieces_at + column[:, None], mask=there, other=0.0)
        else:
            inside = column < C
            tile = tl.load(tokens_at + column[None, :], mask=counted & inside[None, :], other=0.0)
            weight = tl.load(pieces_at + column[:, None], mask=there & inside[:, None], other=0.0)
        acc = tl.dot(tile.to(OPERAND), weight.to(OPERAND), acc, input_precision=PRECISION)
    if PIECES == 2:
        return tl.sum(tl.reshape(acc, (BLOCK_L, 2, ROWS)), axis=1)
    else:
        return acc


@triton.jit
def pool_scores_kernel(
    x, pieces, counts, scores, tops, totals, x_strides, piece_stride, length, rows,
    C: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """Scores ``[B, R, L]`` of a tile of tokens, minus infinity at padding; per row their maximum and the sum of their
    exponentials relative to it, ``[B, R, tiles]``. ``pieces``: ``[PIECES, R, C]``.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_L
    stop = _stop(counts, b, length, HAS_COUNTS)
    values = _products(
        x + b * x_strides[0], pieces, x_strides[1], first, stop, group, rows, piece_stride,
        C, ROWS, PIECES, BLOCK_L, BLOCK_C, OPERAND, PRECISION,
    )  # fmt: skip
    token = first + tl.arange(0, BLOCK_L)
    values = tl.where((token < stop)[:, None], values, float("-inf"))
    row = group * ROWS + tl.arange(0, ROWS)
    at = b * rows + row
    there = row < rows
    mask = there[None, :] & (token < length)[:, None]
    tl.store(scores + at[None, :] * length + token[:, None], values, mask=mask)
    top = tl.max(values, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tiles = tl.num_programs(0)
    tl.store(tops + at * tiles + tile, top, mask=there)
    tl.store(totals + at * tiles + tile, tl.sum(tl.exp(values - safe[None, :]), axis=0), mask=there)


@triton.jit
def pool_lse_kernel(tops, totals, lse, tiles, BLOCK: tl.constexpr):
    """Log-sum-exp of one row from its tiles' maxima and sums; minus infinity where there are no tokens."""
    row = tl.program_id(0).to(tl.int64)
    tops += row * tiles
    totals += row * tiles
    tops_seen = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tops_seen = tl.maximum(tops_seen, tl.load(tops + at, mask=at < tiles, other=float("-inf")))
    top = tl.max(tops_seen, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scale = tl.exp(tl.load(tops + at, mask=at < tiles, other=float("-inf")) - safe)
        sums += scale * tl.load(totals + at, mask=at < tiles, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(lse + row, top + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _multiply(share, vector, acc, PIECES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + share vector`` in float32; of two pieces each, all but the product of the two small ones."""
    if PIECES == 2:
        share_high = share.to(tl.bfloat16)
        share_low = (share - share_high.to(tl.float32)).to(tl.bfloat16)
        vector_high = vector.to(tl.bfloat16)
        vector_low = (vector - vector_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(share_high.to(OPERAND), vector_high.to(OPERAND), acc)
        acc = tl.dot(share_low.to(OPERAND), vector_high.to(OPERAND), acc)
        return tl.dot(share_high.to(OPERAND), vector_low.to(OPERAND), acc)
    else:
        return tl.dot(share, vector, acc, input_precision=PRECISION)


@triton.jit
def pool_backward_kernel(
    x, pieces, counts, scores, lse, shift, d_sums, folded, d_x, shares, x_strides, piece_stride, length, rows,
    C: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, HAS_COUNTS: tl.constexpr,
    NEED_X: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """A tile of tokens: ds, and with ``NEED_X`` (few rows) d_x = p^T g + ds^T w, zero at padding.

    ``pieces``: of g, ``[PIECES, B, R, C]``; ``shift``: dlse - g . sums, ``[B, R]``. ``shares`` takes ``SHARES`` times R
    rows of all tokens, zero at padding: ds, or p and then ds.
    """
    first = tl.program_id(0) * BLOCK_L
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    stop = _stop(counts, b, length, HAS_COUNTS)
    values = _products(
        x + b * x_strides[0], pieces + b * rows * C, x_strides[1], first, stop, group, rows, piece_stride,
        C, ROWS, PIECES, BLOCK_L, BLOCK_C, OPERAND, PRECISION,
    )  # fmt: skip
    token = first + tl.arange(0, BLOCK_L)
    row = group * ROWS + tl.arange(0, ROWS)
    there = row < rows
    at = b * rows + row
    counted = there[None, :] & (token < stop)[:, None]
    score = tl.load(scores + at[None, :] * length + token[:, None], mask=counted, other=float("-inf"))
    high = tl.load(lse + at, mask=there, other=0.0)
    # A sample without tokens has a log-sum-exp of minus infinity, from which nothing can be subtracted.
    p = tl.exp(score - tl.where(high == float("-inf"), 0.0, high)[None, :])
    # Where the gradients are not finite, padding still has none.
    d = tl.where(counted, p * (values + tl.load(shift + at, mask=there, other=0.0)[None, :]), 0.0)
    mask = there[None, :] & (token < length)[:, None]
    if SHARES == 2:
        tl.store(shares + (2 * b * rows + row)[None, :] * length + token[:, None], p, mask=mask)
    if SHARES > 0:
        into = shares + ((SHARES * b + SHARES - 1) * rows + row)[None, :] * length + token[:, None]
        tl.store(into, d, mask=mask)
    if NEED_X:
        # p and ds of a row side by side, so that a tensor core's depth of 16 takes 8 rows.
        share = tl.reshape(tl.join(p, d), (BLOCK_L, 2 * ROWS))
        k = tl.arange(0, 2 * ROWS)
        own = k // 2
        g_at = d_sums + ((b * rows + own) * C)[:, None]
        w_at = folded + (own * C)[:, None]
        is_g = ((own < rows) & (k % 2 == 0))[:, None]
        is_w = ((own < rows) & (k % 2 == 1))[:, None]
        for start in range(0, C, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = (column < C)[None, :]
            vector = tl.load(g_at + column[None, :], mask=is_g & inside, other=0.0)
            vector += tl.load(w_at + column[None, :], mask=is_w & inside, other=0.0)
            acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
            acc = _multiply(share, vector, acc, PIECES, OPERAND, PRECISION)
            # At padding the shares are zero, but the other factor may not be finite.
            acc = tl.where((token < stop)[:, None], acc, 0.0)
            to = d_x + (b * length + token)[:, None] * C + column[None, :]
            tl.store(to, acc.to(d_x.dtype.element_ty), mask=(token < length)[:, None] & inside)


@triton.jit
def pool_sums_kernel(
    x, weights, lse, counts, parts, x_strides, length, rows, first_row, all_rows, splits, per_split,
    C: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, HAS_COUNTS: tl.constexpr, FROM_SCORES: tl.constexpr,
):  # fmt: skip
    """Sums of the tokens of a run, weighted by ``weights[:, first_row:]`` (``[B, all_rows, L]``, of which R rows):
    ``parts`` ``[B, splits, R, C]``, of which a program has some columns. ``FROM_SCORES``: the weights are
    exp(scores - lse).
    """
    chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    column = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // chunks
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin = split * per_split
    end = tl.minimum(begin + per_split, _stop(counts, b, length, HAS_COUNTS))
    n = tl.arange(0, PIECES * ROWS)
    row = group * ROWS + n % ROWS
    x_at = x + b * x_strides[0] + column[None, :]
    weights_at = weights + (b * all_rows + first_row + row)[:, None] * length
    if FROM_SCORES:
        high = tl.load(lse + b * rows + row, mask=row < rows, other=0.0)[:, None]
    acc = tl.zeros((PIECES * ROWS, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_L):
        token = start + tl.arange(0, BLOCK_L)
        counted = token < end
        there = (row < rows)[:, None] & counted[None, :]
        if FROM_SCORES:
            weight = tl.exp(tl.load(weights_at + token[None, :], mask=there, other=float("-inf")) - high)
        else:
            weight = tl.load(weights_at + token[None, :], mask=there, other=0.0)
        if PIECES == 2:
            upper = weight.to(tl.bfloat16)
            lower = (weight - upper.to(tl.float32)).to(tl.bfloat16)
            weight = tl.where((n < ROWS)[:, None], upper, lower)
        # int64: tokens times their stride exceed 2^31.
        tokens_at = x_at + (token.to(tl.int64) * x_strides[1])[:, None]
        if C % BLOCK_C == 0:
            tile = tl.load(tokens_at, mask=counted[:, None], other=0.0)
        else:
            tile = tl.load(tokens_at, mask=counted[:, None] & (column < C)[None, :], other=0.0)
        acc = tl.dot(weight.to(OPERAND), tile.to(OPERAND), acc, input_precision=PRECISION)
    if PIECES == 2:
        acc = tl.sum(tl.reshape(acc, (2, ROWS, BLOCK_C)), axis=0)
    own = group * ROWS + tl.arange(0, ROWS)
    mask = (own < rows)[:, None] & (column < C)[None, :]
    tl.store(parts + ((b * splits + split) * rows + own)[:, None] * C + column[None, :], acc, mask=mask)


@triton.jit
def pool_d_tokens_kernel(
    shares, d_sums, folded, counts, d_x, length, rows,
    C: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """A tile of d_x = p^T g + ds^T w, zero at padding, of p and ds from memory: where rows are many."""
    chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    column = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) // chunks * BLOCK_L
    b = tl.program_id(1).to(tl.int64)
    token = first + tl.arange(0, BLOCK_L)
    counted = (token < _stop(counts, b, length, HAS_COUNTS))[:, None]
    inside = (column < C)[None, :]
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for start in range(0, 2 * rows, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        share = tl.load(
            shares + (2 * b * rows + k)[None, :] * length + token[:, None], mask=(k < 2 * rows)[None, :] & counted,
            other=0.0,
        )  # fmt: skip
        vector = tl.load(
            d_sums + (b * rows + k)[:, None] * C + column[None, :], mask=(k < rows)[:, None] & inside, other=0.0
        )
        other = ((k >= rows) & (k < 2 * rows))[:, None] & inside
        vector += tl.load(folded + (k - rows)[:, None] * C + column[None, :], mask=other, other=0.0)
        acc = _multiply(share, vector, acc, PIECES, OPERAND, PRECISION)
    # At padding the shares are zero, but the other factor may not be finite.
    acc = tl.where(counted, acc, 0.0)
    at = d_x + (b * length + token)[:, None] * C + column[None, :]
    tl.store(at, acc.to(d_x.dtype.element_ty), mask=(token < length)[:, None] & inside)
