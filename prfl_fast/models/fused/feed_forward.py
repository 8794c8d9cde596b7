"""The feed-forward branch: of two linears and a GELU only the pre-activation is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from prfl_fast.models.fused.branches import gated_linear
from prfl_fast.models.fused.linears import hooked, linears
from prfl_fast.models.fused.values import Value, class_path, gelu

_GELU = "diffusers.models.activations.GELU"


def feed_forward(
    ff: Any, residual: Tensor, normed: Value, gate: Tensor | None, segments: Sequence[int] | None = None
) -> Tensor:
    """``residual + gate ff(normed)`` for a diffusers ``FeedForward``; one without a GELU, or hooked, is called."""
    act, dropout, *rest = ff.net
    inert = isinstance(dropout, nn.Dropout) and (dropout.p == 0 or not dropout.training)
    if class_path(type(act)) != _GELU or not inert or any(map(hooked, (ff, act, dropout))):
        return gated_linear(residual, normed, [ff], gate, segments)
    (pre,) = linears(normed, act.proj)
    return gated_linear(residual, gelu(pre, act.approximate), rest, gate, segments)
