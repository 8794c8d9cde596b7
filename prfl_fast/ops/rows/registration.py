"""The three row ops and their one backward as torch ops, with shapes without values and autograd.

Each op names its backend, so a gradient runs where its forward ran. Modulations are ``[B, R, C]`` (modulation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.dtypes import DTYPES, NUMBERS
from prfl_fast.ops.rows import reference

_library = torch.library.Library("prfl_fast", "FRAGMENT")  # noqa: TOR901 (it has to live as long as the process)

_NORM = "Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, int[] segments, float eps, bool rms, str backend"
_library.define(f"modulated_norm(Tensor x, {_NORM}) -> (Tensor, Tensor, Tensor)")
_library.define("gated_residual(Tensor residual, Tensor y, Tensor? gate, int[] segments, str backend) -> Tensor")
_library.define(
    f"gated_residual_norm(Tensor residual, Tensor y, Tensor? gate, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor)"
)
# dtypes: one per gradient of x, y, gate, scale, shift, weight, bias (dtypes.py), -1 where it is not wanted; as many
# tensors as are wanted come back, in this order.
_library.define(
    "row_backward(Tensor stream, Tensor? y, Tensor? gate, Tensor? scale, int shift_rows, Tensor? weight, Tensor? bias, "
    "Tensor? mean, Tensor? rstd, Tensor? d_stream, Tensor? d_out, int[] segments, int[] dtypes, str backend) "
    "-> Tensor[]"
)


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from prfl_fast.kernels import row_launch

        return row_launch.forward(*arguments)
    return reference.forward(*arguments)


def _modulated_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[int],
    eps: float,
    rms: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(backend, x, None, None, scale, shift, weight, bias, segments, eps, rms, True)[1:]


def _gated_residual(
    residual: Tensor, y: Tensor, gate: Tensor | None, segments: Sequence[int], backend: str
) -> Tensor:
    return _forward(backend, residual, y, gate, None, None, None, None, segments, 0.0, True, False)[0]


def _gated_residual_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[int],
    eps: float,
    rms: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(backend, residual, y, gate, scale, shift, weight, bias, segments, eps, rms, True)


def _row_backward(
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
    dtypes: Sequence[int],
    backend: str,
) -> list[Tensor]:
    kept = (stream, y, gate, scale, shift_rows, weight, bias, mean, rstd, d_stream, d_out, segments)
    kinds = [DTYPES[number] if number >= 0 else None for number in dtypes]
    if backend == "triton":
        from prfl_fast.kernels import row_launch

        return [gradient for gradient in row_launch.backward(*kept, kinds) if gradient is not None]
    gradients = reference.backward(*kept, [kind is not None for kind in kinds])
    return [g.to(kind, copy=True) for g, kind in zip(gradients, kinds, strict=True) if g is not None]


for _name, _function in (
    ("modulated_norm", _modulated_norm),
    ("gated_residual", _gated_residual),
    ("gated_residual_norm", _gated_residual_norm),
    ("row_backward", _row_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    rstd = torch.empty(x.shape[:2], dtype=reference.compute_dtype(x), device=x.device)
    return (rstd.new_empty(0) if rms else torch.empty_like(rstd)), rstd


def _fake_modulated_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), *_statistics(x, rest[-2])


def _fake_gated_residual(residual: Tensor, *rest: Any) -> Tensor:
    return _like(residual)


def _fake_gated_residual_norm(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(residual), _like(residual), *_statistics(residual, rest[-2])


def _fake_row_backward(
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
    dtypes: Sequence[int],
    backend: str,
) -> list[Tensor]:
    batch, length, channels = stream.shape
    rows = (length, length, 0 if gate is None else gate.shape[1], 0 if scale is None else scale.shape[1], shift_rows)
    return [
        torch.empty((batch, rows[i], channels) if i < 5 else (channels,), dtype=DTYPES[number], device=stream.device)
        for i, number in enumerate(dtypes)
        if number >= 0
    ]


for _name, _fake in (
    ("modulated_norm", _fake_modulated_norm),
    ("gated_residual", _fake_gated_residual),
    ("gated_residual_norm", _fake_gated_residual_norm),
    ("row_backward", _fake_row_backward),
):
    torch.library.register_fake(f"prfl_fast::{_name}", _fake, lib=_library)


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "modulated_norm, gated_residual and gated_residual_norm are differentiable once: create_graph=True has no "
        'second derivative here; ops.backend("reference") and plain torch modules have'
    )


torch.library.register_autograd("prfl_fast::row_backward", _no_second_derivative, lib=_library)


def _backward(
    ctx: Any, d_stream: Tensor | None, d_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, gate, scale, shift, weight, bias."""
    stream, y, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
    if d_stream is None and d_out is None:
        return (None,) * 7
    gated, same = gate is not None, ctx.numbers[0] == ctx.numbers[1]
    wanted = list(ctx.wanted)
    if d_out is None:
        wanted[3:] = [False] * 4
    d_stream = None if d_stream is None else _unit(d_stream)
    d_out = None if d_out is None else _unit(d_out)
    # Without a gate y's gradient is x's; without a norm x's is the stream's own. Neither is written a second time.
    computed = [
        (wanted[0] or (wanted[1] and not gated)) and d_out is not None,
        wanted[1] and gated,
        *wanted[2:],
    ]
    results: list[Tensor | None] = [None] * 7
    if any(computed):
        like = d_stream if stream is None else stream
        numbers = [number if flag else -1 for number, flag in zip(ctx.numbers, computed, strict=True)]
        mean = mean if mean is not None and mean.numel() else None
        arguments = (like, y, gate, scale, ctx.shift_rows, weight, bias, mean, rstd, d_stream, d_out)
        made = iter(torch.ops.prfl_fast.row_backward(*arguments, ctx.segments, numbers, ctx.backend))
        results = [next(made) if flag else None for flag in computed]
    into_x = results[0] if computed[0] else d_stream
    if wanted[1] and not gated and into_x is not None:
        results[1] = into_x if same else into_x.to(DTYPES[ctx.numbers[1]])
    results[0] = into_x if wanted[0] else None
    return tuple(results)


def _unit(gradient: Tensor) -> Tensor:
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] <= 1 else gradient.contiguous()


def _keep(
    ctx: Any, tensors: tuple[Tensor | None, ...], stream: Tensor | None, statistics: tuple[Tensor | None, Tensor | None]
) -> None:
    """``tensors``: x, y, gate, scale, shift, weight, bias. What no wanted gradient needs is not kept."""
    x, y, gate, scale, shift, weight, bias = tensors
    wanted = [tensor is not None and tensor.requires_grad for tensor in tensors]
    ctx.set_materialize_grads(False)
    ctx.wanted = wanted
    ctx.numbers = [-1 if tensor is None else NUMBERS[tensor.dtype] for tensor in tensors]
    ctx.shift_rows = 0 if shift is None else shift.shape[1]
    ctx.save_for_backward(
        stream,
        y if wanted[2] else None,
        gate,
        scale,
        weight,
        bias if wanted[3] else None,
        *statistics,
    )


def _set_up_modulated_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, weight, bias, ctx.segments, _, _, ctx.backend = inputs
    _keep(ctx, (x, None, None, scale, shift, weight, bias), x, output[1:])


def _modulated_norm_backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    into = _backward(ctx, None, d_out)
    return (into[0], *into[3:], None, None, None, None)


def _set_up_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, y, gate, ctx.segments, ctx.backend = inputs
    _keep(ctx, (residual, y, gate, None, None, None, None), None, (None, None))


def _gated_residual_backward(ctx: Any, d_stream: Tensor | None) -> tuple[Any, ...]:
    return (*_backward(ctx, d_stream, None)[:3], None, None)


def _set_up_gated_residual_norm(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    *tensors, ctx.segments, _, _, ctx.backend = inputs
    _keep(ctx, tuple(tensors), output[0], output[2:])


def _gated_residual_norm_backward(ctx: Any, d_stream: Tensor | None, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_backward(ctx, d_stream, d_out), None, None, None, None)


for _name, _derivative, _set_up in (
    ("modulated_norm", _modulated_norm_backward, _set_up_modulated_norm),
    ("gated_residual", _gated_residual_backward, _set_up_gated_residual),
    ("gated_residual_norm", _gated_residual_norm_backward, _set_up_gated_residual_norm),
):
    torch.library.register_autograd(f"prfl_fast::{_name}", _derivative, setup_context=_set_up, lib=_library)
