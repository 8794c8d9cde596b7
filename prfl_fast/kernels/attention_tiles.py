"""Tiles of ``[B, L, H, D]`` tensors as the attention kernels read and write them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(pid, tiles, heads):
    """Tile, sample and head of a program: tiles of one head lie side by side, so that they share its keys in L2."""
    both = pid // tiles
    return pid % tiles, (both // heads).to(tl.int64), (both % heads).to(tl.int64)


@triton.jit
def wide(number):
    """``number`` as int64, since products of rows and strides exceed 2^31; it is a plain int in the interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def read_tile(base, stride, left, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr):
    """``ROWS`` rows of a head from ``base`` on, zero beyond column D and, with ``TAIL``, from row ``left`` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = base + row * stride + column
    if TAIL:
        if D == COLUMNS:
            return tl.load(at, mask=row < left, other=0.0)
        else:
            return tl.load(at, mask=(row < left) & (column < D), other=0.0)
    else:
        if D == COLUMNS:
            return tl.load(at)
        else:
            return tl.load(at, mask=column < D, other=0.0)


@triton.jit
def write_tile(base, stride, left, value, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows before ``left`` and columns before D of a tile, in the dtype that ``base`` points to."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = row < left
    if D != COLUMNS:
        mask = mask & (column < D)
    tl.store(base + row * stride + column, value.to(base.dtype.element_ty), mask=mask)
