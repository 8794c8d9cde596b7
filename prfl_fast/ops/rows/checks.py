"""One validation for the row ops, and the choice of their backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prfl_fast.ops import backends
from prfl_fast.ops.dtypes import NUMBERS
from prfl_fast.ops.rows.modulation import check_segments, kernel_segments, unit_stride, view_modulation

BACKENDS = ("triton", "reference")


def row_backend(x: Tensor) -> str:
    """``"triton"`` or ``"reference"``: where the row ops run for these tokens."""
    return backends.choose(x.device, BACKENDS)


def check_tokens(name: str, x: Tensor) -> Tensor:
    """``x`` with a last stride of 1.

    Raises:
        ValueError: not ``[B, L, C]`` with at least one channel.
        TypeError: a dtype other than float32, float64, float16, bfloat16.
    """
    if x.dtype not in NUMBERS:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"{name}: expected tokens [B, L, C], got shape {tuple(x.shape)}")
    return unit_stride(x)


def branch_arguments(
    residual: Tensor, y: Tensor, gate: Tensor | None, segments: Sequence[int] | None
) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """``y``, ``gate`` and segments as the ops take them; the checks of :func:`gated_residual`."""
    y = check_tokens("y", y)
    if y.shape != residual.shape or y.device != residual.device:
        raise ValueError(
            f"y: expected the shape and device of residual, {tuple(residual.shape)} on {residual.device}, "
            f"got {tuple(y.shape)} on {y.device}"
        )
    length = residual.shape[1]
    runs = check_segments(segments, length)
    return y, view_modulation("gate", gate, residual, runs), kernel_segments(runs, length)


def norm_arguments(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[int] | None,
    eps: float,
    kind: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[int, ...], float, bool]:
    """Scale, shift, weight, bias, segments, eps and "is RMS" as the ops take them; checks of :func:`modulated_norm`."""
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number that is not negative, got {eps}")
    length, channels = x.shape[1:]
    runs = check_segments(segments, length)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
        if tensor.shape != (channels,) or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected shape ({channels},) on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
    return (
        view_modulation("scale", scale, x, runs),
        view_modulation("shift", shift, x, runs),
        None if weight is None else unit_stride(weight),
        None if bias is None else unit_stride(bias),
        kernel_segments(runs, length),
        float(eps),
        kind == "rms",
    )
