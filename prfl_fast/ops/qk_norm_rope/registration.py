"""The op on one tensor, queries or keys, and its backward as torch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.dtypes import DTYPES, NUMBERS
from prfl_fast.ops.qk_norm_rope import reference
from prfl_fast.ops.rows.modulation import unit_stride
from prfl_fast.ops.rows.reference import compute_dtype

_library = torch.library.Library("prfl_fast", "FRAGMENT")  # noqa: TOR901 (it has to live as long as the process)

# kept_output: the backward starts from the result, else from x. Results: out, mean, rstd.
_library.define(
    "qk_norm_rope(Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, float eps, bool rms, "
    "bool across_heads, bool interleaved, int start, bool kept_output, str backend) -> (Tensor, Tensor, Tensor)"
)
# dtypes of the gradients of x, weight, bias (dtypes.py), -1 where not wanted; as many tensors come back as are wanted.
_library.define(
    "qk_norm_rope_backward(Tensor kept, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, Tensor? mean, "
    "Tensor rstd, Tensor d_out, bool rms, bool across_heads, bool interleaved, int start, bool kept_output, "
    "int[] dtypes, str backend) -> Tensor[]"
)


def _forward(
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
    kept_output: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (x, weight, bias, cos, sin, eps, rms, across_heads, interleaved, start)
    if backend == "triton":
        from prfl_fast.kernels import qk_norm_rope

        return qk_norm_rope.forward(*arguments)
    return reference.forward(*arguments)


def _backward(
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
    dtypes: Sequence[int],
    backend: str,
) -> list[Tensor]:
    arguments = (kept, weight, bias, cos, sin, mean, rstd, d_out, rms, across_heads, interleaved, start, kept_output)
    kinds = [DTYPES[number] if number >= 0 else None for number in dtypes]
    if backend == "triton":
        from prfl_fast.kernels import qk_norm_rope

        made = qk_norm_rope.backward(*arguments, kinds)
        return [gradient for gradient in made if gradient is not None]
    gradients = reference.backward(*arguments, [kind is not None for kind in kinds])
    return [g.to(kind, copy=True) for g, kind in zip(gradients, kinds, strict=True) if g is not None]


_library.impl("qk_norm_rope", _forward, "CompositeExplicitAutograd")
_library.impl("qk_norm_rope_backward", _backward, "CompositeExplicitAutograd")


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rms, across_heads = rest[5], rest[6]
    rstd = torch.empty(x.shape[:2] if across_heads else x.shape[:3], dtype=compute_dtype(x), device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


def _fake_backward(kept: Tensor, *rest: Any) -> list[Tensor]:
    across_heads: bool = rest[8]
    dtypes: Sequence[int] = rest[12]
    heads, dim = kept.shape[2:]
    columns = (heads * dim if across_heads else dim,)
    return [
        torch.empty(kept.shape if index == 0 else columns, dtype=DTYPES[number], device=kept.device)
        for index, number in enumerate(dtypes)
        if number >= 0
    ]


torch.library.register_fake("prfl_fast::qk_norm_rope", _fake_forward, lib=_library)
torch.library.register_fake("prfl_fast::qk_norm_rope_backward", _fake_backward, lib=_library)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, cos, sin, _, *ctx.settings, ctx.backend = inputs
    kept_output = ctx.settings[-1]
    parameters = (x, weight, bias)
    ctx.numbers = [-1 if t is None or not t.requires_grad else NUMBERS[t.dtype] for t in parameters]
    ctx.set_materialize_grads(False)
    out, mean, rstd = output
    # Starting from x, the bias is not needed, and RMSNorm has no mean.
    ctx.save_for_backward(out if kept_output else x, weight, bias if kept_output else None, cos, sin, mean, rstd)


def _derivative(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    results: list[Tensor | None] = [None] * 3
    if d_out is not None and any(number >= 0 for number in ctx.numbers):
        kept, weight, bias, cos, sin, mean, rstd = ctx.saved_tensors
        rms, across_heads, interleaved, start, kept_output = ctx.settings
        made = iter(
            torch.ops.prfl_fast.qk_norm_rope_backward(
                kept, weight, bias, cos, sin, mean if mean.numel() else None, rstd, unit_stride(d_out),
                rms, across_heads, interleaved, start, kept_output, ctx.numbers, ctx.backend,
            )  # fmt: skip
        )
        results = [next(made) if number >= 0 else None for number in ctx.numbers]
    return (*results, *([None] * 9))


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("qk_norm_rope is differentiable once: create_graph=True has no second derivative here")


torch.library.register_autograd("prfl_fast::qk_norm_rope", _derivative, setup_context=_set_up, lib=_library)
torch.library.register_autograd("prfl_fast::qk_norm_rope_backward", _no_second_derivative, lib=_library)
