"""Formulas of the norm and the rotation in plain torch, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prfl_fast.ops.rows.reference import compute_dtype


def _pairs(x: Tensor, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    part = x[..., :rotated]
    if interleaved:
        return part[..., 0::2], part[..., 1::2]
    return part[..., : rotated // 2], part[..., rotated // 2 :]


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, start: int) -> Tensor:
    """Pairs ``(a, b) -> (a cos - b sin, a sin + b cos)`` of the tokens from ``start`` on."""
    if cos is None or sin is None or not cos.numel():
        return x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    stop, rotated = start + cos.shape[1], 2 * cos.shape[3]
    a, b = _pairs(x[:, start:stop], rotated, interleaved)
    first, second = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([first, second], dim=-1).flatten(-2) if interleaved else torch.cat([first, second], dim=-1)
    result = x.clone()
    result[:, start:stop, :, :rotated] = turned
    return result


def _transpose(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of the rotation: what a gradient goes back through."""
    return cos, None if sin is None else -sin


def _inverse(cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Of the rotation: cos and sin are rounded numbers, whose squares do not sum to 1."""
    if cos is None or sin is None:
        return None, None
    cos, sin = cos.to(dtype), sin.to(dtype)
    size = cos.square() + sin.square()
    return cos / size, -sin / size


def _over(x: Tensor, across_heads: bool) -> tuple[int, ...]:
    """The dimensions that a norm is over."""
    return (-2, -1) if across_heads else (-1,)


def _spread(statistic: Tensor, across_heads: bool) -> Tensor:
    return statistic[..., None, None] if across_heads else statistic[..., None]


def _parameter(parameter: Tensor, x: Tensor, across_heads: bool) -> Tensor:
    wide = parameter.to(compute_dtype(x))
    return wide.unflatten(0, x.shape[2:]) if across_heads else wide


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    rms: bool,
    across_heads: bool,
    interleaved: bool,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean and reciprocal deviation, ``[B, L]`` across heads, else ``[B, L, H]``; RMSNorm has no mean."""
    dims = _over(x, across_heads)
    value = x.to(compute_dtype(x))
    mean = value.new_empty(0)
    if not rms:
        mean = value.mean(dims)
        value = value - _spread(mean, across_heads)
    rstd = 1 / torch.sqrt(value.square().mean(dims) + eps)
    value = value * _spread(rstd, across_heads)
    if weight is not None:
        value = value * _parameter(weight, x, across_heads)
    if bias is not None:
        value = value + _parameter(bias, x, across_heads)
    return rotate(value, cos, sin, interleaved, start).to(x.dtype), mean, rstd


def backward(
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    d_out: Tensor,
    rms: bool,
    across_heads: bool,
    interleaved: bool,
    start: int,
    kept_output: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight and bias in the compute dtype, None where not ``needed``.

    From the result (``kept_output``): turned back, it is ``n weight + bias``. Else from x.
    """
    dtype, dims = compute_dtype(kept), _over(kept, across_heads)
    d = rotate(d_out.to(dtype), *_transpose(cos, sin), interleaved, start)
    n = kept.to(dtype)
    if kept_output:
        n = rotate(n, *_inverse(cos, sin, dtype), interleaved, start)
        if bias is not None:
            n = n - _parameter(bias, kept, across_heads)
        if weight is not None:
            n = n / _parameter(weight, kept, across_heads)
    else:
        if not rms and mean is not None:
            n = n - _spread(mean, across_heads)
        n = n * _spread(rstd, across_heads)
    tokens = (0, 1) if across_heads else (0, 1, 2)
    into_weight = (d * n).sum(tokens).flatten() if needed[1] else None
    into_bias = d.sum(tokens).flatten() if needed[2] else None
    into_x = None
    if needed[0]:
        if weight is not None:
            d = d * _parameter(weight, kept, across_heads)
        along = (d * n).mean(dims, keepdim=True)
        level = 0.0 if rms else d.mean(dims, keepdim=True)
        into_x = _spread(rstd, across_heads) * (d - level - n * along)
    return [into_x, into_weight, into_bias]
