"""The solver step in plain torch: what every backend is compared with, and what runs where there is no other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prfl_fast.ops.solver_step.coefficients import StepCoefficients


class _Wide:
    """Float32 tensors as float64, each converted once. MPS has no float64; there they stay as they are."""

    def __init__(self) -> None:
        self._converted: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64 or tensor.device.type == "mps":
            return tensor
        return self._converted.setdefault(id(tensor), tensor.double())


def _combine(terms: Iterable[tuple[float, Tensor | None]], wide: _Wide) -> Tensor | None:
    """Sum of coefficient times tensor, rounded once; None where nothing is left. A lone 1 times tensor is no copy."""
    present = [(coefficient, tensor) for coefficient, tensor in terms if coefficient != 0 and tensor is not None]
    if not present:
        return None
    (first, tensor), *others = present
    if first == 1 and not others:
        return tensor
    total = wide(tensor) * first
    for coefficient, other in others:
        total = torch.add(total, wide(other), alpha=coefficient)
    return total.to(tensor.dtype)


def guide(conditional: Tensor, unconditional: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``u + scale (c - u)`` in ``dtype``, in the grouping of diffusers' pipelines (others differ in the last bits)."""
    c, u = conditional.to(dtype), unconditional.to(dtype)
    return u + scale * (c - u)


def guide_transpose(cotangent: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Adjoint of :func:`guide`, in ``dtype``, with autograd's roundings."""
    whole = cotangent.to(dtype)
    conditional = whole * scale
    return conditional, whole - conditional


def step(
    state: Sequence[Tensor],
    model_outputs: Sequence[Tensor],
    coefficients: StepCoefficients,
    guidance_scale: float,
    guidance_dtype: torch.dtype,
    noise: Sequence[Tensor],
    mask: Tensor | None,
) -> list[Tensor]:
    """State after the step; see :func:`prfl_fast.ops.solver_step`. ``mask`` is bool."""
    dtype = state[0].dtype
    m = model_outputs[0]
    if len(model_outputs) == 2:
        m = guide(m, model_outputs[1], guidance_scale, guidance_dtype)
    m = m.to(dtype)
    draws = [draw.to(dtype) for draw in noise]
    wide = _Wide()
    result = []
    for row_a, b, row_c in zip(coefficients.A, coefficients.B, coefficients.C, strict=True):
        entry = _combine([*zip(row_a, state, strict=True), (b, m), *zip(row_c, draws, strict=True)], wide)
        result.append(torch.zeros_like(state[0]) if entry is None else entry)
    if mask is not None:
        result[0] = torch.where(mask, result[0], state[0])
    return result


def transpose(
    cotangents: Sequence[Tensor | None],
    coefficients: StepCoefficients,
    mask: Tensor | None,
    output_dtypes: Sequence[torch.dtype],
    guidance_scale: float,
    guidance_dtype: torch.dtype,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Adjoint of :func:`step`, one cotangent per result; ``mask`` is bool."""
    rows = list(cotangents)
    untouched: Tensor | None = None
    x = rows[0]
    if mask is not None and x is not None:
        untouched = torch.where(mask, torch.zeros_like(x), x)
        rows[0] = torch.where(mask, x, torch.zeros_like(x))
    wide = _Wide()
    into_state = [_combine(zip(column, rows, strict=True), wide) for column in zip(*coefficients.A, strict=True)]
    if untouched is not None:
        into_state[0] = untouched if into_state[0] is None else into_state[0] + untouched
    into_output = _combine(zip(coefficients.B, rows, strict=True), wide) if output_dtypes else None
    if into_output is None:
        return tuple(into_state), (None,) * len(output_dtypes)
    into_outputs: tuple[Tensor, ...] = (into_output,)
    if len(output_dtypes) == 2:
        into_outputs = guide_transpose(into_output, guidance_scale, guidance_dtype)
    return tuple(into_state), tuple(g.to(dtype) for g, dtype in zip(into_outputs, output_dtypes, strict=True))
