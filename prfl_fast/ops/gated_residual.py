"""The gated residual of an AdaLN block in one pass (adaLN-Zero of DiT, arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prfl_fast.ops.rows.checks import branch_arguments, check_tokens, norm_arguments, row_backend


def gated_residual(
    residual: Tensor, y: Tensor, gate: Tensor | None = None, *, segments: Sequence[int] | None = None
) -> Tensor:
    """``residual + gate y``, in float32 (float64 for float64 tokens), rounded once.

    Kept for the backward: the gate, and ``y`` where the gate wants a gradient. The gradient of ``residual`` is the
    result's own. Sums over tokens are the same bits in every run. Differentiable once.

    Args:
        residual: ``[B, L, C]`` stream of tokens, any float dtype; last stride 1 (else a copy is made).
        y: ``[B, L, C]`` output of a branch, any float dtype.
        gate: ``[B, C]``, ``[B, 1, C]``, ``[B, L, C]``, or ``[B, G, C]`` with ``segments``; B may be 1. None is 1.
        segments: G run lengths that sum to L.

    Returns:
        ``[B, L, C]`` in the dtype of ``residual``.

    Raises:
        ValueError: wrong shapes, devices or segments.
        TypeError: no float dtype.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    residual = check_tokens("residual", residual)
    y, gate, runs = branch_arguments(residual, y, gate, segments)
    stream: Tensor = torch.ops.prfl_fast.gated_residual(residual, y, gate, runs, row_backend(residual))
    return stream


def gated_residual_norm(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    segments: Sequence[int] | None = None,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
) -> tuple[Tensor, Tensor]:
    """``r = residual + gate y`` and ``modulated_norm(r)``: the stream is read once and written once.

    The norm is that of the stream *after* it was rounded to its dtype, so a recomputation from the kept stream gives
    the same bits. Kept for the backward: the new stream, mean and reciprocal deviation per token, the parameters, and
    ``y`` where the gate wants a gradient. Arguments and errors as in :func:`gated_residual` and :func:`modulated_norm`.

    Returns:
        The new stream and its modulated norm, both ``[B, L, C]`` in the dtype of ``residual``.
    """
    residual = check_tokens("residual", residual)
    y, gate, _ = branch_arguments(residual, y, gate, segments)
    arguments = norm_arguments(residual, scale, shift, weight, bias, segments, eps, kind)
    made = torch.ops.prfl_fast.gated_residual_norm(residual, y, gate, *arguments, row_backend(residual))
    stream: Tensor = made[0]
    normed: Tensor = made[1]
    return stream, normed
