"""The end of a branch: projection, gate and residual, and the norm that follows, without keeping the projection.

With ``y = v W^T + b`` and ``r = x + g y`` for one gate ``g`` per sample (or run of tokens), the product
``M = dr^T v`` gives both gradients: ``dW = g M`` and ``dg = sum_k W M + b sum_l dr``. So ``y`` is never read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prfl_fast.models.fused.linears import is_plain, linears
from prfl_fast.models.fused.values import Norm, Value, normed_value
from prfl_fast.ops import gated_residual, gated_residual_norm
from prfl_fast.ops.dtypes import NUMBERS
from prfl_fast.ops.rows.checks import check_tokens, norm_arguments, row_backend
from prfl_fast.ops.rows.modulation import check_segments, unit_stride, view_modulation

# With more gates than this (samples x runs) a product for each would cost more than keeping the projection.
_MAX_GATES = 8


def gated_linear(
    residual: Tensor,
    source: Value,
    layers: Sequence[nn.Module],
    gate: Tensor | None,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """``residual + gate layers(value)`` ``[B, L, C]``: a projection (and its dropout) on its way back to the stream."""
    linear = _foldable(residual, source.value, layers, gate, segments)
    if linear is None:
        return gated_residual(residual, _run(source, layers), gate, segments=segments)
    stream: Tensor = _fold(residual, source, linear, gate, None, None, None, segments)[0]
    return stream


def gated_linear_norm(
    residual: Tensor,
    source: Value,
    layers: Sequence[nn.Module],
    gate: Tensor | None,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Value]:
    """:func:`gated_linear`, and the modulated norm of the new stream in the same pass."""
    linear = _foldable(residual, source.value, layers, gate, segments)
    if linear is not None:
        stream, normed = _fold(residual, source, linear, gate, norm, scale, shift, segments)
        return stream, normed_value(normed, stream, norm, scale, shift, segments)
    return gated_norm(residual, _run(source, layers), gate, norm, scale, shift, segments)


def gated_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Value]:
    """:func:`prfl_fast.ops.gated_residual_norm` of a branch's output: the new stream, its modulated norm as a value."""
    stream, normed = gated_residual_norm(
        residual, y, gate, scale, shift, norm.weight, norm.bias, segments=segments, eps=norm.eps, kind=norm.kind
    )
    return stream, normed_value(normed, stream, norm, scale, shift, segments)


def _run(source: Value, layers: Sequence[nn.Module]) -> Tensor:
    first, *rest = layers
    (y,) = linears(source, first)
    for layer in rest:
        y = layer(y)
    return y


def _foldable(
    residual: Tensor, value: Tensor, layers: Sequence[nn.Module], gate: Tensor | None, segments: Sequence[int] | None
) -> nn.Linear | None:
    """The one linear among ``layers`` where the rest does nothing and the gates are few."""
    linear, *rest = layers
    if any(not isinstance(layer, nn.Dropout) or (layer.p > 0 and layer.training) for layer in rest):
        return None
    if not isinstance(linear, nn.Linear) or not is_plain(linear, value) or residual.dtype != value.dtype:
        return None
    if gate is not None:
        rows = 1 if gate.ndim == 2 else gate.shape[1]
        runs = 1 if segments is None else len(segments)
        if rows not in (1, runs) or residual.shape[0] * rows > _MAX_GATES:
            return None
    return linear


class _Settings(NamedTuple):
    formula: Callable[..., Tensor] | None
    runs: tuple[int, ...]
    eps: float
    rms: bool
    normed: bool
    backend: str


def _fold(
    residual: Tensor,
    source: Value,
    linear: nn.Linear,
    gate: Tensor | None,
    norm: Norm | None,
    scale: Tensor | None,
    shift: Tensor | None,
    segments: Sequence[int] | None,
) -> Any:
    residual = check_tokens("residual", residual)
    length = residual.shape[1]
    own = Norm(None, None, 0.0, "rms") if norm is None else norm
    arguments = norm_arguments(residual, scale, shift, own.weight, own.bias, segments, own.eps, own.kind)
    *modulation, runs, eps, rms = arguments
    gate = view_modulation("gate", gate, residual, check_segments(segments, length))
    settings = _Settings(source.formula, runs, eps, rms, norm is not None, row_backend(residual))
    sources = [None if t is None else t.detach() for t in source.sources] or [source.value.detach()]
    apply: Any = _Branch.apply
    return apply(settings, residual, source.value, linear.weight, linear.bias, gate, *modulation, *sources)


def _gates(gate: Tensor | None, batch: int, length: int, runs: tuple[int, ...]) -> Iterator[tuple[int, int, slice]]:
    """Sample, row of the gate, and tokens that it stands for."""
    own = runs if gate is not None and gate.shape[1] > 1 else (length,)
    for sample in range(batch):
        start = 0
        for row, run in enumerate(own):
            yield sample, row, slice(start, start + run)
            start += run


class _Branch(torch.autograd.Function):
    """``residual + gate (value W^T + b)``, and its modulated norm; keeps what :mod:`prfl_fast.models.fused` says."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        residual: Tensor,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *sources: Tensor | None,
    ) -> Any:
        y = F.linear(value, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        needed = ctx.needs_input_grad
        modulation = (scale, shift, norm_weight, norm_bias)
        ctx.numbers = [-1 if t is None or not needed[6 + i] else NUMBERS[t.dtype] for i, t in enumerate(modulation)]
        ctx.shift_rows = 0 if shift is None else shift.shape[1]
        mean = rstd = None
        if settings.normed:
            stream, normed, mean, rstd = torch.ops.prfl_fast.gated_residual_norm(
                residual, y, gate, *modulation, settings.runs, settings.eps, settings.rms, settings.backend
            )
        else:
            stream = torch.ops.prfl_fast.gated_residual(residual, y, gate, settings.runs, settings.backend)
            normed = None
        needs_value = needed[3] or needed[5]
        ctx.save_for_backward(
            stream if settings.normed else None, weight, bias if needed[5] else None, gate, scale, norm_weight,
            norm_bias if needed[6] else None, mean, rstd, *(sources if needs_value else [None] * len(sources)),
        )  # fmt: skip
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> Any:
        stream, weight, bias, gate, scale, norm_weight, norm_bias, mean, rstd, *sources = ctx.saved_tensors
        settings: _Settings = ctx.settings
        d, into_norm = d_stream, [None] * 4
        if d_normed is not None:
            numbers = [NUMBERS[stream.dtype], -1, -1, *ctx.numbers]
            made = iter(
                torch.ops.prfl_fast.row_backward(
                    stream, None, None, scale, ctx.shift_rows, norm_weight, norm_bias,
                    mean if mean.numel() else None, rstd, None if d is None else unit_stride(d), unit_stride(d_normed),
                    settings.runs, numbers, settings.backend,
                )  # fmt: skip
            )
            d = next(made)
            into_norm = [next(made) if number >= 0 else None for number in ctx.numbers]
        nothing = [None] * len(sources)
        if d is None:
            return (None,) * 10 + tuple(nothing)
        needed = ctx.needs_input_grad
        value: Tensor | None = None
        if needed[3] or needed[5]:
            value = sources[0] if settings.formula is None else settings.formula(*sources)
        into = _through(d, value, weight, bias, gate, settings.runs, needed[2:6])
        return (None, d if needed[1] else None, *into, *into_norm, *nothing)


def _through(
    d: Tensor,
    value: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    runs: tuple[int, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of value, weight, bias and gate from that of the stream ``[B, L, C]``."""
    batch, length, channels = d.shape
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    into_value: list[Tensor] = []
    into_gate = torch.zeros(gate.shape, dtype=wide, device=d.device) if gate is not None and needed[3] else None
    into_weight: Tensor | None = None
    into_bias: Tensor | None = None
    if gate is None:
        rows = d.reshape(-1, channels)
        if needed[1] and value is not None:
            into_weight = rows.mT @ value.reshape(rows.shape[0], -1)
        return [
            d @ weight if needed[0] else None, into_weight, rows.sum(0) if needed[2] else None, None
        ]  # fmt: skip
    for sample, row, tokens in _gates(gate, batch, length, runs):
        part, own = d[sample, tokens], gate[sample, row]
        if needed[0]:
            into_value.append(part @ (own.unsqueeze(1) * weight).to(weight.dtype))
        if value is not None:
            product = part.mT @ value[sample, tokens]
            if needed[1]:
                share = product * own.unsqueeze(1).to(wide)
                into_weight = share if into_weight is None else into_weight.add_(share)
            if into_gate is not None:
                into_gate[sample, row] += (product.to(wide) * weight).sum(1)
        if needed[2] or (into_gate is not None and bias is not None):
            summed = part.sum(0, dtype=wide)
            if needed[2]:
                share = summed * own
                into_bias = share if into_bias is None else into_bias + share
            if into_gate is not None and bias is not None:
                into_gate[sample, row] += summed * bias
    return [
        torch.cat(into_value).reshape(batch, length, -1) if needed[0] else None,
        None if into_weight is None else into_weight.to(weight.dtype),
        None if into_bias is None else into_bias.to(weight.dtype),
        None if into_gate is None or gate is None else into_gate.to(gate.dtype),
    ]
