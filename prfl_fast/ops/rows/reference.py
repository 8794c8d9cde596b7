"""The rows' formulas in plain torch, forward and backward: what the kernels are compared with, and what runs on a CPU.

Computes in float32, in float64 for float64 tokens, and rounds each result once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prfl_fast.ops.rows.modulation import per_row, sum_rows


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a row's arithmetic and its statistics are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[int],
    eps: float,
    rms: bool,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New stream, its modulated norm, mean ``[B, L]`` and reciprocal deviation ``[B, L]``; empty where there is none.

    Arguments as :mod:`prfl_fast.kernels.rows` names them, modulations ``[B, R, C]``.
    """
    dtype, length = compute_dtype(x), x.shape[1]
    empty = x.new_empty(0)
    stream = empty
    value = x.to(dtype)
    if y is not None:
        branch = y.to(dtype)
        if gate is not None:
            branch = branch * per_row(gate, length, segments).to(dtype)
        stream = (value + branch).to(x.dtype)
        value = stream.to(dtype)
    if not normed:
        return stream, empty, empty, empty
    mean = empty.to(dtype)
    if not rms:
        mean = value.mean(-1)
        value = value - mean.unsqueeze(-1)
    rstd = 1 / torch.sqrt(value.square().mean(-1) + eps)
    out = value * rstd.unsqueeze(-1)
    if weight is not None:
        out = out * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    if scale is not None:
        out = out * (1 + per_row(scale, length, segments).to(dtype))
    if shift is not None:
        out = out + per_row(shift, length, segments).to(dtype)
    return stream, out.to(x.dtype), mean, rstd


def backward(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift_rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    d_stream: Tensor | None,
    d_out: Tensor | None,
    segments: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, y, gate, scale, shift, weight, bias in the compute dtype, None where not ``needed``.

    ``shift_rows``: R of the shift, whose values do not matter.
    """
    dtype, length = compute_dtype(stream), stream.shape[1]
    into_x = None if d_stream is None else d_stream.to(dtype)
    into: dict[str, Tensor] = {}
    if d_out is not None and rstd is not None:
        d = d_out.to(dtype)
        n = stream.to(dtype)
        if mean is not None:
            n = n - mean.unsqueeze(-1)
        n = n * rstd.unsqueeze(-1)
        if needed[4]:
            into["shift"] = sum_rows(d, shift_rows, segments)
        if scale is not None:
            if needed[3]:
                a = n if weight is None else n * weight.to(dtype)
                a = a if bias is None else a + bias.to(dtype)
                into["scale"] = sum_rows(d * a, scale.shape[1], segments)
            d = d * (1 + per_row(scale, length, segments).to(dtype))
        if needed[6]:
            into["bias"] = d.sum((0, 1))
        if weight is not None:
            if needed[5]:
                into["weight"] = (d * n).sum((0, 1))
            d = d * weight.to(dtype)
        along = (d * n).mean(-1, keepdim=True)
        level = 0.0 if mean is None else d.mean(-1, keepdim=True)
        through = rstd.unsqueeze(-1) * (d - level - n * along)
        into_x = through if into_x is None else through + into_x
    if into_x is not None:
        if gate is not None:
            if needed[2] and y is not None:
                into["gate"] = sum_rows(into_x * y.to(dtype), gate.shape[1], segments)
            into["y"] = into_x * per_row(gate, length, segments).to(dtype)
        else:
            into["y"] = into_x
        into["x"] = into_x
    names = ("x", "y", "gate", "scale", "shift", "weight", "bias")
    return [into.get(name) if wanted else None for name, wanted in zip(names, needed, strict=True)]
