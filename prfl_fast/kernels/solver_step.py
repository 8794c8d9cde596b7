"""The solver step and its transpose in Triton; csrc/ops/solver_step/linear_map.h says what they compute.

Sums are taken in float64 by fused products, as on every other backend. A float argument of a Triton kernel is a
float32, so each coefficient travels as three that add up to it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from prfl_fast.kernels.configurations import Launch, shape_of

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TYPES = dict(zip(_DTYPES, (tl.float32, tl.float64, tl.float16, tl.bfloat16), strict=True))
_BLOCK = 1024


@triton.jit
def _coefficient(parts, index: tl.constexpr):
    """Entry ``index`` of the coefficients, in float64."""
    # Adding to a float64 converts: a part is a float32 scalar here, and a plain float in the interpreter.
    return tl.full((), 0.0, tl.float64) + parts[3 * index] + parts[3 * index + 1] + parts[3 * index + 2]


@triton.jit
def solver_step_kernel(
    terms,
    second,
    mask,
    parts,
    guidance,
    rows,
    extra,
    length,
    zero_pattern: tl.constexpr,
    guided: tl.constexpr,
    has_second: tl.constexpr,
    has_mask: tl.constexpr,
    has_extra: tl.constexpr,
    transposed: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    block: tl.constexpr,
):
    """One block of elements: every term read once, every result written once.

    zero_pattern: one flag per coefficient (terms outermost), true where it is zero: such a term does not count, were it
    infinite. G is the dtype of guidance. The other arguments are those of LinearMap.
    """
    n_terms: tl.constexpr = len(terms)
    n_rows: tl.constexpr = len(rows)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < length
    operation: tl.constexpr = tl.float64 if G == tl.float64 else tl.float32  # torch's for G
    scale = _coefficient(guidance, 0).to(operation)
    if has_mask:
        change = tl.load(mask + at, mask=inside, other=0) != 0
    sums = ()
    for _ in tl.static_range(n_rows):
        sums = sums + (tl.full((block,), -0.0, tl.float64),)
    for t in tl.static_range(n_terms):
        loaded = tl.load(terms[t] + at, mask=inside, other=0.0)
        value = loaded.to(T)
        if has_second:
            if transposed:
                if t == 0:
                    value = value + tl.load(second + at, mask=inside, other=0.0).to(T)
            else:
                if t == guided:
                    other = _rounded(tl.load(second + at, mask=inside, other=0.0), G).to(operation)
                    apart = _rounded(_rounded(loaded, G).to(operation) - other, G).to(operation)
                    value = _rounded(other + _rounded(scale * apart, G).to(operation), G).to(T)
        if has_mask:
            if t == 0:
                held = value
                if transposed:
                    value = tl.where(change, value, tl.zeros_like(value))
        wide = value.to(tl.float64)
        added = ()
        for r in tl.static_range(n_rows):
            if zero_pattern[t * n_rows + r]:
                added = added + (sums[r],)
            else:
                factor = tl.full((block,), 0.0, tl.float64) + _coefficient(parts, t * n_rows + r)
                added = added + (tl.fma(factor, wide, sums[r]),)
        sums = added
    for r in tl.static_range(n_rows):
        result = sums[r].to(T)
        if has_mask:
            if r == 0:
                if transposed:
                    result = result + tl.where(change, tl.zeros_like(held), held)
                else:
                    result = tl.where(change, result, held)
        if has_extra:
            if transposed:
                if r == guided:
                    whole = _rounded(result, G).to(operation)
                    result = _rounded(whole * scale, G).to(operation)
                    rest = _rounded(whole - result, G).to(operation)
                    tl.store(extra + at, _rounded(rest, extra.dtype.element_ty), mask=inside)
            else:
                if r == 0:
                    tl.store(extra + at, _rounded(result, extra.dtype.element_ty), mask=inside)
        tl.store(rows[r] + at, _rounded(result, rows[r].dtype.element_ty), mask=inside)


@triton.jit
def _rounded(value, wanted: tl.constexpr):
    """``value`` in another dtype; half precision by way of float32, as torch rounds."""
    if wanted.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(wanted)


def _three(number: float) -> tuple[float, float, float]:
    """A float64 as the exact sum of three float32 (numbers below 1e-30 keep fewer bits)."""
    high = _float32(number)
    middle = _float32(number - high)
    return high, middle, _float32(number - high - middle)


def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _launch(
    terms: Sequence[Tensor],
    second: Tensor | None,
    mask: Tensor | None,
    coefficients: Sequence[float],
    guided: int,
    guidance_scale: float,
    numbers: Sequence[int],
    extra_number: int,
    transposed: bool,
    T: torch.dtype,
    G: torch.dtype,
) -> list[Tensor]:
    like = terms[0]
    n_terms, n_rows = len(terms), len(numbers)
    results = [torch.empty(like.shape, dtype=_DTYPES[number], device=like.device) for number in numbers]
    extra = torch.empty(like.shape, dtype=_DTYPES[extra_number], device=like.device) if extra_number >= 0 else None
    length = like.numel()
    if length:
        by_term = [coefficients[r * n_terms + t] for t in range(n_terms) for r in range(n_rows)]
        terms = [term.contiguous() for term in terms]
        with torch.cuda.device_of(like):
            solver_step_kernel[(triton.cdiv(length, _BLOCK),)](
                tuple(terms),
                terms[0] if second is None else second.contiguous(),
                terms[0] if mask is None else mask.contiguous().view(torch.uint8),
                tuple(part for number in by_term for part in _three(number)),
                _three(guidance_scale),
                tuple(results),
                results[0] if extra is None else extra,
                length,
                zero_pattern=tuple(number == 0 for number in by_term),
                guided=guided,
                has_second=second is not None,
                has_mask=mask is not None,
                has_extra=extra is not None,
                transposed=transposed,
                T=_TYPES[T],
                G=_TYPES[G],
                block=_BLOCK,
                num_warps=4 if n_rows <= 4 else 8,
                # Only the sums are fused; guidance has the reference's roundings.
                enable_fp_fusion=False,
            )
    return results if extra is None else [*results, extra]


def step(
    terms: Sequence[Tensor],
    unconditional: Tensor | None,
    mask: Tensor | None,
    coefficients: Sequence[float],
    guided: int,
    guidance_scale: float,
    guidance_dtype: int,
    dtype: int,
    copy_dtype: int,
) -> list[Tensor]:
    """``prfl_fast::solver_step_triton``."""
    numbers = [dtype] * (len(coefficients) // len(terms))
    return _launch(
        terms,
        unconditional,
        mask,
        coefficients,
        guided,
        guidance_scale,
        numbers,
        copy_dtype,
        False,
        _DTYPES[dtype],
        _DTYPES[guidance_dtype],
    )


def transpose(
    cotangents: Sequence[Tensor],
    copy_cotangent: Tensor | None,
    mask: Tensor | None,
    coefficients: Sequence[float],
    dtypes: Sequence[int],
    guided: int,
    guidance_scale: float,
    guidance_dtype: int,
    unconditional_dtype: int,
) -> list[Tensor]:
    """``prfl_fast::solver_step_transpose_triton``."""
    return _launch(
        cotangents,
        copy_cotangent,
        mask,
        coefficients,
        guided,
        guidance_scale,
        dtypes,
        unconditional_dtype,
        True,
        cotangents[0].dtype,
        _DTYPES[guidance_dtype],
    )


def production(architecture: int) -> Iterator[Launch]:
    """Steps on latents of 81 frames at 480p: state in float32, network in bfloat16, guidance; and all in float64."""
    narrow, half, double = (_DTYPES.index(kind) for kind in (torch.float32, torch.bfloat16, torch.float64))
    for name, rows, state_number, output_number in (
        ("Euler", 1, narrow, half),
        ("UniPC", 3, narrow, half),
        ("UniPC float64", 3, double, double),
    ):
        state = shape_of(1, 16, 21, 60, 104, dtype=_DTYPES[state_number])
        output = shape_of(1, 16, 21, 60, 104, dtype=_DTYPES[output_number])
        coefficients = [0.3 + index for index in range(rows * (rows + 1))]
        yield Launch(
            "solver_step", f"{name} forward",
            partial(step, (state,) * rows + (output,), output, None, coefficients, rows, 5.0, output_number,
                    state_number, output_number),
        )  # fmt: skip
        yield Launch(
            "solver_step", f"{name} backward",
            partial(transpose, (state,) * rows, output, None, coefficients, [state_number] * rows + [output_number],
                    rows, 5.0, output_number, output_number),
        )  # fmt: skip
