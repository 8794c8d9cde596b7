"""Queries or keys of two streams side by side, each with its own norm: the pair is kept once, joined."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prfl_fast.models.fused.values import Norm
from prfl_fast.ops import qk_norm_rope
from prfl_fast.ops.dtypes import NUMBERS
from prfl_fast.ops.qk_norm_rope.op import can_undo
from prfl_fast.ops.rows.checks import row_backend
from prfl_fast.ops.rows.modulation import unit_stride


class _Settings(NamedTuple):
    eps: float
    backend: str


def joint_norm_rope(
    first: Tensor, second: Tensor, norms: tuple[Norm, Norm], angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``first`` ``[B, L, H, D]``, normed per head and rotated, and ``second`` ``[B, T, H, D]``, normed: ``[B, L + T,
    H, D]``. Their backward starts from the joined result, which attention keeps."""
    cos, sin = angles or (None, None)
    undone = not torch.compiler.is_compiling() and all(n.kind == "rms" and can_undo(n.weight, n.bias) for n in norms)
    if undone and norms[0].bias is None and norms[1].bias is None and norms[0].eps == norms[1].eps:
        settings = _Settings(norms[0].eps, row_backend(first))
        apply: Any = _Joint.apply
        joined: Tensor = apply(settings, unit_stride(first), unit_stride(second), norms[0].weight, norms[1].weight,
                               cos, sin)  # fmt: skip
        return joined
    parts = [
        qk_norm_rope(
            x, None, norm.weight, q_bias=norm.bias, cos=own_cos, sin=own_sin, eps=norm.eps, kind=norm.kind,
            across_heads=False,
        )  # fmt: skip
        for x, norm, own_cos, own_sin in ((first, norms[0], cos, sin), (second, norms[1], None, None))
    ]
    return torch.cat(parts, dim=1)


class _Joint(torch.autograd.Function):
    """RMSNorm per head of both, rotation of the first; keeps the joined result and the reciprocal deviations."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        first: Tensor,
        second: Tensor,
        first_weight: Tensor | None,
        second_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        run = torch.ops.prfl_fast.qk_norm_rope
        rest = (settings.eps, True, False, True, 0, True, settings.backend)
        a, _, a_rstd = run(first, first_weight, None, cos, sin, *rest)
        b, _, b_rstd = run(second, second_weight, None, None, None, *rest)
        joined = torch.cat([a, b], dim=1)
        ctx.settings, ctx.length = settings, first.shape[1]
        ctx.save_for_backward(joined, first_weight, second_weight, cos, sin, a_rstd, b_rstd)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Any:
        joined, first_weight, second_weight, cos, sin, a_rstd, b_rstd = ctx.saved_tensors
        d, needed = unit_stride(d), ctx.needs_input_grad
        into: list[Tensor | None] = []
        for part, weight, own_cos, own_sin, rstd, wants in (
            (slice(None, ctx.length), first_weight, cos, sin, a_rstd, (needed[1], needed[3])),
            (slice(ctx.length, None), second_weight, None, None, b_rstd, (needed[2], needed[4])),
        ):
            kinds = (joined.dtype, None if weight is None else weight.dtype)
            numbers = [
                NUMBERS[kind] if want and kind is not None else -1 for want, kind in zip(wants, kinds, strict=True)
            ]
            made = iter(())
            if max(numbers) >= 0:
                made = iter(
                    torch.ops.prfl_fast.qk_norm_rope_backward(
                        joined[:, part], weight, None, own_cos, own_sin, None, rstd, d[:, part], True, False, True, 0,
                        True, [*numbers, -1], ctx.settings.backend,
                    )  # fmt: skip
                )
            into += [next(made) if number >= 0 else None for number in numbers]
        return (None, into[0], into[2], into[1], into[3], None, None)
