"""Second stage of the column sums: partial sums of row kernels added up in one fixed order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_COLUMNS = 128


@triton.jit
def column_sum_kernel(
    partials,
    sums,
    per_sample,
    firsts,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sums[b, g] = sum of partials[b, firsts[g] : firsts[g + 1]], ``[.., C]``; a program has 128 columns of one sum."""
    groups: tl.constexpr = len(firsts) - 1
    pid = tl.program_id(1)
    b = pid // groups
    g = pid % groups
    start = 0
    stop = 0
    for k in tl.static_range(groups):
        start = tl.where(g == k, firsts[k], start)
        stop = tl.where(g == k, firsts[k + 1], stop)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    row = tl.arange(0, ROWS)
    base = partials + (b.to(tl.int64) * per_sample) * C
    total = tl.zeros((ROWS, COLUMNS), partials.dtype.element_ty)
    for at in range(start, stop, ROWS):
        here = (at + row)[:, None]
        mask = (here < stop) & inside[None, :]
        total += tl.load(base + here.to(tl.int64) * C + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(sums + pid.to(tl.int64) * C + column, result.to(sums.dtype.element_ty), mask=inside)


def column_sum(partials: Tensor, firsts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums of rows ``firsts[g]`` to ``firsts[g + 1]`` of ``partials`` ``[B, P, C]``: ``[B, G, C]`` in ``dtype``."""
    batch, rows, channels = partials.shape
    sums = torch.empty(batch, len(firsts) - 1, channels, dtype=dtype, device=partials.device)
    if sums.numel():
        grid = (triton.cdiv(channels, _COLUMNS), batch * (len(firsts) - 1))
        with torch.cuda.device_of(partials):
            column_sum_kernel[grid](partials, sums, rows, firsts, C=channels, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return sums
