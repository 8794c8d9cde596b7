"""The row kernels behind `modulated_norm`, `gated_residual` and `gated_residual_norm`, forward and backward.

A row is one token. Per row, in float32 (float64 for float64 tokens):

    r = residual + gate y                  rounded to the dtype of the residual and, where there is a norm, read back
    n = (r - mean) rstd                    LayerNorm; RMSNorm without the mean
    a = n weight + bias
    out = a (1 + scale) + shift

Each op is this with some of it left out. The row lies in registers as a few chunks of columns, so every tensor is read
once and written once. The backward keeps partial column sums in registers over a run of rows of one modulation segment;
:mod:`prfl_fast.kernels.columns` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class RowLaunch:
    """How a row is laid over a program: ``chunks`` pieces of ``block`` columns, and the program's warps.

    ``registers``: of a thread at most, None for as many as the assembler likes.
    """

    block: int
    chunks: int
    num_warps: int
    registers: int | None = None


def launch_for(channels: int, *, backward: bool, sums: bool = False) -> RowLaunch:
    """The least padded layout; at most 1,024 columns a piece, so that none is half empty. ``sums``: of columns."""
    if channels <= 256:
        block = max(triton.next_power_of_2(channels), 16)
        return RowLaunch(block, 1, 1)
    block = min((1024, 512, 256), key=lambda size: (triton.cdiv(channels, size) * size, -size))
    # 16 bytes of bfloat16 a thread and piece forward; the backward holds twice the values, and column sums.
    chunks, warps = triton.cdiv(channels, block), (block // 256) * (2 if backward else 1)
    # Up to 3 pieces of 1,024 a row fits in 64 registers; left alone, the assembler spills to get below.
    return RowLaunch(block, chunks, warps, 64 if channels <= 3072 and not sums else None)


@triton.jit
def _segment(row, starts):
    """Which segment a row lies in."""
    index = row * 0
    for k in tl.static_range(1, len(starts)):
        index += (row >= starts[k]).to(row.dtype)
    return index


@triton.jit
def _read(pointer, offset, column, C: tl.constexpr, T: tl.constexpr):
    """One piece of a row, zero beyond its end."""
    return tl.load(pointer + offset + column, mask=column < C, other=0.0).to(T)


@triton.jit
def _write(pointer, offset, column, value, C: tl.constexpr):
    tl.store(pointer + offset + column, value.to(pointer.dtype.element_ty), mask=column < C)


@triton.jit
def row_forward_kernel(
    x, y, gate, scale, shift, weight, bias, stream, out, mean, rstd,
    x_strides, y_strides, gate_strides, scale_strides, shift_strides,
    length, starts, eps: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, T: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, RMS: tl.constexpr,
    GATE_SEGMENTS: tl.constexpr, SCALE_SEGMENTS: tl.constexpr, SHIFT_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One row. Strides are (sample, row) in elements; a modulation that is one per sample has a row stride of zero."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    segment = _segment(row, starts)
    x_at = b * x_strides[0] + row * x_strides[1]
    flat = (b * length + row) * C
    values = ()
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        value = _read(x, x_at, column, C, T)
        if HAS_Y:
            branch = _read(y, b * y_strides[0] + row * y_strides[1], column, C, T)
            if HAS_GATE:
                at = b * gate_strides[0] + (segment if GATE_SEGMENTS else row) * gate_strides[1]
                branch = branch * _read(gate, at, column, C, T)
            # As the stream holds it: a recomputation that starts from it then gives the same bits.
            rounded = (value + branch).to(stream.dtype.element_ty)
            tl.store(stream + flat + column, rounded, mask=column < C)
            value = rounded.to(T)
        values = values + (value,)
    if HAS_NORM:
        center = tl.zeros((), T)
        if not RMS:
            total = tl.zeros((BLOCK,), T)
            for k in tl.static_range(CHUNKS):
                total += values[k]
            center = tl.sum(total, axis=0) / C
            tl.store(mean + b * length + row, center)
        squares = tl.zeros((BLOCK,), T)
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK + tl.arange(0, BLOCK)
            apart = tl.where(column < C, values[k] - center, 0.0)
            squares += apart * apart
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + eps)
        tl.store(rstd + b * length + row, inverse)
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK + tl.arange(0, BLOCK)
            result = (values[k] - center) * inverse
            if HAS_WEIGHT:
                result = result * _read(weight, 0, column, C, T)
            if HAS_BIAS:
                result = result + _read(bias, 0, column, C, T)
            if HAS_SCALE:
                at = b * scale_strides[0] + (segment if SCALE_SEGMENTS else row) * scale_strides[1]
                result = result * (1.0 + _read(scale, at, column, C, T))
            if HAS_SHIFT:
                at = b * shift_strides[0] + (segment if SHIFT_SEGMENTS else row) * shift_strides[1]
                result = result + _read(shift, at, column, C, T)
            _write(out, flat, column, result, C)


@triton.jit
def row_backward_kernel(
    stream, y, gate, scale, weight, bias, mean, rstd, d_stream, d_out,
    d_x, d_y, d_gate, d_scale, d_shift, d_weight, d_bias,
    stream_strides, y_strides, gate_strides, scale_strides, d_stream_strides, d_out_strides,
    length, starts, firsts, rows_per_program,
    C: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, T: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, RMS: tl.constexpr, HAS_D_STREAM: tl.constexpr,
    GATE_SEGMENTS: tl.constexpr, SCALE_SEGMENTS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr, NEED_GATE: tl.constexpr, NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    GATE_TOKENS: tl.constexpr, SCALE_TOKENS: tl.constexpr, SHIFT_TOKENS: tl.constexpr,
):  # fmt: skip
    """A run of rows of one segment. ``firsts``: the first program of each segment.

    d_gate, d_scale and d_shift hold the gradient itself, ``[B, L, C]``, where the modulation is per token (``TOKENS``),
    else one partial sum per program, ``[B, P, C]``, as d_weight and d_bias do.
    """
    b = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    segment = _segment(program, firsts)
    begin = 0
    first = 0
    end = length
    for k in tl.static_range(len(starts)):
        begin = tl.where(segment == k, starts[k], begin)
        first = tl.where(segment == k, firsts[k], first)
        if k + 1 < len(starts):
            end = tl.where(segment == k, starts[k + 1], end)
    begin = begin + (program - first) * rows_per_program
    end = tl.minimum(begin + rows_per_program, end)

    gate_sums = ()
    scale_sums = ()
    shift_sums = ()
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(CHUNKS):
        gate_sums = gate_sums + (tl.zeros((BLOCK,), T),)
        scale_sums = scale_sums + (tl.zeros((BLOCK,), T),)
        shift_sums = shift_sums + (tl.zeros((BLOCK,), T),)
        weight_sums = weight_sums + (tl.zeros((BLOCK,), T),)
        bias_sums = bias_sums + (tl.zeros((BLOCK,), T),)

    for r in range(begin, end):
        row = tl.full((), 0, tl.int64) + r  # a plain number in the interpreter
        flat = (b * length + row) * C
        stream_at = b * stream_strides[0] + row * stream_strides[1]
        d_out_at = b * d_out_strides[0] + row * d_out_strides[1]
        d_stream_at = b * d_stream_strides[0] + row * d_stream_strides[1]
        inverse = tl.zeros((), T)
        center = tl.zeros((), T)
        normed = ()
        inner = ()
        if HAS_NORM:
            inverse = tl.load(rstd + b * length + row).to(T)
            if not RMS:
                center = tl.load(mean + b * length + row).to(T)
            products = tl.zeros((BLOCK,), T)
            plain = tl.zeros((BLOCK,), T)
            new_scale = ()
            new_shift = ()
            new_weight = ()
            new_bias = ()
            for k in tl.static_range(CHUNKS):
                column = k * BLOCK + tl.arange(0, BLOCK)
                inside = column < C
                n = tl.where(inside, (_read(stream, stream_at, column, C, T) - center) * inverse, 0.0)
                d = _read(d_out, d_out_at, column, C, T)
                if NEED_SHIFT:
                    if SHIFT_TOKENS:
                        _write(d_shift, flat, column, d, C)
                        new_shift = new_shift + (shift_sums[k],)
                    else:
                        new_shift = new_shift + (shift_sums[k] + d,)
                if HAS_SCALE:
                    if NEED_SCALE:
                        a = n
                        if HAS_WEIGHT:
                            a = a * _read(weight, 0, column, C, T)
                        if HAS_BIAS:
                            a = a + _read(bias, 0, column, C, T)
                        if SCALE_TOKENS:
                            _write(d_scale, flat, column, d * a, C)
                            new_scale = new_scale + (scale_sums[k],)
                        else:
                            new_scale = new_scale + (scale_sums[k] + d * a,)
                    at = b * scale_strides[0] + (segment if SCALE_SEGMENTS else row) * scale_strides[1]
                    d = d * (1.0 + _read(scale, at, column, C, T))
                if NEED_BIAS:
                    new_bias = new_bias + (bias_sums[k] + d,)
                if HAS_WEIGHT:
                    if NEED_WEIGHT:
                        new_weight = new_weight + (weight_sums[k] + d * n,)
                    d = d * _read(weight, 0, column, C, T)
                products += d * n
                plain += d
                normed = normed + (n,)
                inner = inner + (d,)
            if NEED_SHIFT:
                shift_sums = new_shift
            if NEED_SCALE:
                scale_sums = new_scale
            if NEED_WEIGHT:
                weight_sums = new_weight
            if NEED_BIAS:
                bias_sums = new_bias
            along = tl.sum(products, axis=0) / C
            level = tl.zeros((), T)
            if not RMS:
                level = tl.sum(plain, axis=0) / C
        new_gate = ()
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK + tl.arange(0, BLOCK)
            into = tl.zeros((BLOCK,), T)
            if HAS_NORM:
                into = inverse * (inner[k] - level - normed[k] * along)
            if HAS_D_STREAM:
                into += _read(d_stream, d_stream_at, column, C, T)
            if NEED_X:
                _write(d_x, flat, column, into, C)
            if HAS_GATE:
                at = b * gate_strides[0] + (segment if GATE_SEGMENTS else row) * gate_strides[1]
                if NEED_GATE:
                    term = into * _read(y, b * y_strides[0] + row * y_strides[1], column, C, T)
                    if GATE_TOKENS:
                        _write(d_gate, flat, column, term, C)
                        new_gate = new_gate + (gate_sums[k],)
                    else:
                        new_gate = new_gate + (gate_sums[k] + term,)
                if NEED_Y:
                    _write(d_y, flat, column, into * _read(gate, at, column, C, T), C)
        if NEED_GATE:
            gate_sums = new_gate

    part = (b * tl.num_programs(0) + program) * C
    for k in tl.static_range(CHUNKS):
        column = k * BLOCK + tl.arange(0, BLOCK)
        if NEED_GATE:
            if not GATE_TOKENS:
                _write(d_gate, part, column, gate_sums[k], C)
        if NEED_SCALE:
            if not SCALE_TOKENS:
                _write(d_scale, part, column, scale_sums[k], C)
        if NEED_SHIFT:
            if not SHIFT_TOKENS:
                _write(d_shift, part, column, shift_sums[k], C)
        if NEED_WEIGHT:
            _write(d_weight, part, column, weight_sums[k], C)
        if NEED_BIAS:
            _write(d_bias, part, column, bias_sums[k], C)
