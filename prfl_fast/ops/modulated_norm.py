"""Norm and AdaLN modulation in one pass (adaptive layer norm of DiT, arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prfl_fast.ops.rows.checks import check_tokens, norm_arguments, row_backend


def modulated_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    segments: Sequence[int] | None = None,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
) -> Tensor:
    """``(1 + scale) norm(x) + shift``; ``norm`` is LayerNorm or RMSNorm over the channels, affine where asked.

    Statistics and arithmetic are in float32 (float64 for float64 tokens) and the result is rounded once. Kept for the
    backward: ``x``, mean and reciprocal deviation per token, and the parameters; no normed tensor. Sums over tokens
    (gradients of scale, shift, weight, bias) are taken in a fixed order and are the same bits in every run; those that
    no one wants are not computed. Differentiable once.

    Args:
        x: ``[B, L, C]`` tokens, any float dtype; strides as they come, the last one 1 (else a copy is made).
        scale: ``[B, C]``, ``[B, 1, C]``, ``[B, L, C]``, or ``[B, G, C]`` with ``segments``; B may be 1, any float
            dtype. None: no factor.
        shift: as ``scale``. None: nothing is added.
        weight: ``[C]``, the norm's own factor, or None.
        bias: ``[C]``, or None.
        segments: G run lengths that sum to L: tokens of one run share a row of ``[B, G, C]``.
        eps: added to the variance (to the mean square).
        kind: ``"layer"`` subtracts the mean, ``"rms"`` does not.

    Returns:
        ``[B, L, C]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shapes, devices, segments, eps or kind.
        TypeError: no float dtype.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    x = check_tokens("x", x)
    arguments = norm_arguments(x, scale, shift, weight, bias, segments, eps, kind)
    out: Tensor = torch.ops.prfl_fast.modulated_norm(x, *arguments, row_backend(x))[0]
    return out
