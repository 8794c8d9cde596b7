"""The solver step as torch ops: schemas, shapes without values, and derivatives.

Every backend has two ops, the step and its transpose. Both are linear, so each is the derivative of the other, to any
order, and nothing but a mask is kept for a backward. All terms of the step (state, network output, noise) are one list;
coefficients are row by row, one row per result, in the order of the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from prfl_fast.ops.dtypes import DTYPES, NUMBERS

# As csrc/ops/solver_step/linear_map.h has it.
MAX_TERMS = 16

# guided: index of the network's output among the terms (in the transpose: among the results), where there is an
# unconditional output beside it. guidance_dtype: that of guidance's arithmetic, read where there is some. It and dtype,
# copy_dtype, dtypes: see dtypes.py; -1 is none.
# Results: one tensor of dtype per row, then x' in copy_dtype.
_STEP = (
    "(Tensor[] terms, Tensor? unconditional, Tensor? mask, float[] coefficients, int guided, float guidance_scale, "
    "int guidance_dtype, int dtype, int copy_dtype) -> Tensor[]"
)
# Results: one tensor per entry of dtypes, then the unconditional output's gradient.
_TRANSPOSE = (
    "(Tensor[] cotangents, Tensor? copy_cotangent, Tensor? mask, float[] coefficients, int[] dtypes, int guided, "
    "float guidance_scale, int guidance_dtype, int unconditional_dtype) -> Tensor[]"
)

_library = torch.library.Library("prfl_fast", "FRAGMENT")  # noqa: TOR901 (it has to live as long as the process)


def _empty(like: Tensor, number: int) -> Tensor:
    return torch.empty(like.shape, dtype=DTYPES[number], device=like.device)


def _fake_step(
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
    numbers = [dtype] * (len(coefficients) // len(terms)) + ([copy_dtype] if copy_dtype >= 0 else [])
    return [_empty(terms[0], number) for number in numbers]


def _fake_transpose(
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
    numbers = [*dtypes, unconditional_dtype] if unconditional_dtype >= 0 else dtypes
    return [_empty(cotangents[0], number) for number in numbers]


def _number(tensor: Tensor | None) -> int:
    return -1 if tensor is None else NUMBERS[tensor.dtype]


def _zeros(gradient: Tensor | None, like: Tensor, number: int) -> Tensor:
    return torch.zeros(like.shape, dtype=DTYPES[number], device=like.device) if gradient is None else gradient


def _keep(ctx: Any, mask: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    if mask is not None:
        ctx.save_for_backward(mask)
    ctx.masked = mask is not None


def _set_up_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    terms, unconditional, mask, ctx.coefficients, *guidance, ctx.dtype, ctx.copy_dtype = inputs
    ctx.guided, ctx.guidance_scale, ctx.guidance_dtype = guidance
    ctx.dtypes = [NUMBERS[term.dtype] for term in terms]
    ctx.unconditional_dtype = _number(unconditional)
    _keep(ctx, mask)


def _step_backward(ctx: Any, gradients: Sequence[Tensor | None], op: Callable[..., list[Tensor]]) -> tuple[Any, ...]:
    width = len(ctx.dtypes)
    rows = [ctx.coefficients[at : at + width] for at in range(0, len(ctx.coefficients), width)]
    cotangents = list(gradients[: len(rows)])
    copy = gradients[len(rows)] if ctx.copy_dtype >= 0 else None
    if cotangents[0] is None and copy is not None:
        cotangents[0], copy = copy.to(DTYPES[ctx.dtype]), None
    # The mask is about x alone, the first row.
    mask = ctx.saved_tensors[0] if ctx.masked and cotangents[0] is not None else None
    present = [r for r, cotangent in enumerate(cotangents) if cotangent is not None]
    needed = list(ctx.needs_input_grad[0])
    if ctx.unconditional_dtype >= 0:
        needed[ctx.guided] = needed[ctx.guided] or ctx.needs_input_grad[1]
    columns = [
        t
        for t in range(width)
        if (mask is not None and t == 0) or (needed[t] and any(rows[r][t] != 0 for r in present))
    ]
    into_terms: list[Tensor | None] = [None] * width
    into_unconditional: Tensor | None = None
    if columns and any(needed[t] for t in columns):
        split = ctx.unconditional_dtype >= 0 and ctx.guided in columns
        results = op(
            [cast(Tensor, cotangents[r]) for r in present],
            copy,
            mask,
            [rows[r][t] for t in columns for r in present],
            [ctx.dtypes[t] for t in columns],
            columns.index(ctx.guided) if split else -1,
            ctx.guidance_scale,
            ctx.guidance_dtype,
            ctx.unconditional_dtype if split else -1,
        )
        for t, result in zip(columns, results, strict=False):
            into_terms[t] = result if ctx.needs_input_grad[0][t] else None
        into_unconditional = results[-1] if split and ctx.needs_input_grad[1] else None
    return into_terms, into_unconditional, *(None,) * 7


def _set_up_transpose(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    cotangents, copy, mask, ctx.coefficients, ctx.dtypes, *guidance, unconditional = inputs
    ctx.guided, ctx.guidance_scale, ctx.guidance_dtype = guidance
    ctx.count = len(cotangents)
    ctx.dtype = NUMBERS[cotangents[0].dtype]
    ctx.copy_dtype = _number(copy)
    ctx.unconditional_dtype = unconditional
    _keep(ctx, mask)


def _transpose_backward(
    ctx: Any, gradients: Sequence[Tensor | None], op: Callable[..., list[Tensor]]
) -> tuple[Any, ...]:
    width = len(ctx.dtypes)
    like = next((gradient for gradient in gradients if gradient is not None), None)
    into: list[Tensor | None] = [None] * ctx.count
    into_copy: Tensor | None = None
    if like is not None:
        guided = ctx.unconditional_dtype >= 0
        mask = ctx.saved_tensors[0] if ctx.masked else None
        terms = list(gradients[:width])
        unconditional = _zeros(gradients[width], like, ctx.unconditional_dtype) if guided else None
        if guided:
            terms[ctx.guided] = _zeros(terms[ctx.guided], like, ctx.dtypes[ctx.guided])
        if mask is not None:
            terms[0] = _zeros(terms[0], like, ctx.dtypes[0])
        present = [t for t, term in enumerate(terms) if term is not None]
        results = op(
            [cast(Tensor, terms[t]) for t in present],
            unconditional,
            mask,
            [ctx.coefficients[t * ctx.count + r] for r in range(ctx.count) for t in present],
            present.index(ctx.guided) if guided else -1,
            ctx.guidance_scale,
            ctx.guidance_dtype,
            ctx.dtype,
            ctx.copy_dtype,
        )
        into = [*results[: ctx.count]]
        into_copy = results[ctx.count] if ctx.copy_dtype >= 0 else None
    return into, into_copy, *(None,) * 7


def define(suffix: str) -> None:
    """Defines ``prfl_fast::solver_step<suffix>`` and ``prfl_fast::solver_step_transpose<suffix>``."""
    step, transpose = f"solver_step{suffix}", f"solver_step_transpose{suffix}"
    _library.define(step + _STEP)
    _library.define(transpose + _TRANSPOSE)
    run_step, run_transpose = getattr(torch.ops.prfl_fast, step), getattr(torch.ops.prfl_fast, transpose)
    torch.library.register_fake(f"prfl_fast::{step}", _fake_step, lib=_library)
    torch.library.register_fake(f"prfl_fast::{transpose}", _fake_transpose, lib=_library)
    torch.library.register_autograd(
        f"prfl_fast::{step}",
        lambda ctx, gradients: _step_backward(ctx, gradients, run_transpose),
        setup_context=_set_up_step,
        lib=_library,
    )
    torch.library.register_autograd(
        f"prfl_fast::{transpose}",
        lambda ctx, gradients: _transpose_backward(ctx, gradients, run_step),
        setup_context=_set_up_transpose,
        lib=_library,
    )


def implement(suffix: str, step: Callable[..., list[Tensor]], transpose: Callable[..., list[Tensor]]) -> None:
    """Registers Python implementations of the two ops, for tensors on a CUDA device and on the CPU."""
    for key in ("CUDA", "CPU"):
        _library.impl(f"solver_step{suffix}", step, key)
        _library.impl(f"solver_step_transpose{suffix}", transpose, key)
