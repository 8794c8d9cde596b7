"""The op as users call it: checks, and what the backward starts from."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from prfl_fast.ops.dtypes import NUMBERS
from prfl_fast.ops.qk_norm_rope import registration as _registration  # noqa: F401 (registers the torch ops)
from prfl_fast.ops.rows.checks import row_backend
from prfl_fast.ops.rows.modulation import unit_stride

# The result is n weight + bias, rounded: taking n out of it magnifies that rounding by |bias / weight|, and a weight
# whose products fall below the smallest numbers of the dtype leaves nothing to take out. A rotated pair is rounded as
# one: a weight far below its partner's drowns in the partner's rounding.
SMALLEST_WEIGHT = 1e-3
LARGEST_BIAS = 8.0
LARGEST_PARTNER = 16.0

# By identity: tensors of one shape compare element by element.
_divisible: Any = WeakTensorKeyDictionary()


def can_undo(
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    pairs: int | None = None,
    dim: int | None = None,
    interleaved: bool = True,
) -> bool:
    """True where the normed input can be had from the result.

    That is: no weight below 1e-3, no bias above 8 weights, and no weight above 16 times the other one of its rotated
    pair, all in size. Reads both on the host, once for as long as they don't change. Fake tensors have no values: True.

    Args:
        weight: ``[H D]`` or ``[D]``, or None.
        bias: likewise.
        pairs: rotated pairs of a head, 0 for no rotation; None: all of them.
        dim: D; None: the whole width is one head's, which makes no difference to neighbours that are all rotated.
        interleaved: pairs are neighbours, else halves of what is rotated.
    """
    key = weight if weight is not None else bias
    if key is None or isinstance(key, FakeTensor):
        return True  # memory is predicted for weights that divide, as trained ones do
    state = (
        pairs,
        dim,
        interleaved,
        *(None if t is None else (id(t), t._version, t.data_ptr()) for t in (weight, bias)),
    )
    seen = _divisible.get(key)
    if seen is None or seen[0] != state:
        seen = _divisible[key] = (state, _look(weight, bias, key.numel() if dim is None else dim, pairs, interleaved))
    return bool(seen[1])


def _look(weight: Tensor | None, bias: Tensor | None, dim: int, pairs: int | None, interleaved: bool) -> bool:
    like = weight if weight is not None else bias
    assert like is not None
    size = torch.ones_like(like, dtype=torch.float32) if weight is None else weight.detach().abs().float()
    added = torch.zeros_like(size) if bias is None else bias.detach().abs().float()
    undone = (size >= SMALLEST_WEIGHT).all() & (added <= LARGEST_BIAS * size).all()
    rotated = 2 * (dim // 2 if pairs is None else pairs)
    if rotated:
        of_pair = (-1, 2) if interleaved else (2, -1)
        sizes, biases = (t.reshape(-1, dim)[:, :rotated].unflatten(1, of_pair) for t in (size, added))
        along = -1 if interleaved else -2
        least = sizes.amin(along)
        undone = undone & (sizes.amax(along) <= LARGEST_PARTNER * least).all()
        undone = undone & (biases.amax(along) <= LARGEST_BIAS * least).all()
    return bool(undone)


def _check(name: str, x: Tensor) -> Tensor:
    if x.dtype not in NUMBERS:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or not x.shape[2] or not x.shape[3] or x.shape[3] % 2:
        raise ValueError(f"{name}: expected [B, L, heads, an even head dimension], got shape {tuple(x.shape)}")
    return unit_stride(x)


def _check_parameter(name: str, parameter: Tensor | None, x: Tensor, across_heads: bool) -> Tensor | None:
    if parameter is None:
        return None
    heads, dim = x.shape[2:]
    size = heads * dim if across_heads else dim
    if not parameter.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {parameter.dtype}")
    if parameter.shape != (size,) or parameter.device != x.device:
        raise ValueError(
            f"{name}: expected shape ({size},) on {x.device}, got {tuple(parameter.shape)} on {parameter.device}"
        )
    return unit_stride(parameter)


def _check_angles(name: str, angles: Tensor, x: Tensor, rotated: int) -> Tensor:
    batch, _, heads, dim = x.shape
    if angles.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")
    if not angles.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {angles.dtype}")
    if (
        angles.ndim != 4
        or angles.shape[0] not in (1, batch)
        or angles.shape[1] != rotated
        or angles.shape[2] not in (1, heads)
        or not 1 <= angles.shape[3] <= dim // 2
        or angles.device != x.device
    ):
        raise ValueError(
            f"{name}: expected [1 or {batch}, {rotated}, 1 or {heads}, at most {dim // 2}] on {x.device}, "
            f"got {tuple(angles.shape)} on {angles.device}"
        )
    return unit_stride(angles)


@overload
def qk_norm_rope(
    q: Tensor,
    k: None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = ...,
    kind: Literal["rms", "layer"] = ...,
    across_heads: bool = ...,
    interleaved: bool = ...,
    rope_tokens: tuple[int, int] | None = ...,
) -> Tensor: ...


@overload
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = ...,
    kind: Literal["rms", "layer"] = ...,
    across_heads: bool = ...,
    interleaved: bool = ...,
    rope_tokens: tuple[int, int] | None = ...,
) -> tuple[Tensor, Tensor]: ...


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: Literal["rms", "layer"] = "rms",
    across_heads: bool = True,
    interleaved: bool = True,
    rope_tokens: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm of queries and keys, then rotary embedding, each read once and written once.

    Arithmetic and statistics are in float32 (float64 for float64 tokens), the result is rounded once. The backward
    starts from the result, which attention keeps anyway, and the reciprocal deviations: turned back, without the bias
    and divided by the weight, it is the normed input. Where a weight is below 1e-3 in size, a bias above 8 times its
    weight or a weight above 16 times the other one of its rotated pair (and inside torch.compile, which can't look) the
    input is kept instead. Sums over tokens are the same bits in every run. Differentiable once.

    Args:
        q: ``[B, Lq, H, D]``, D even, any float dtype; any strides, the last one 1 (else a copy is made).
        k: ``[B, Lk, Hk, D]``, or None: q alone.
        q_weight: ``[H D]`` with ``across_heads``, else ``[D]``; None: no factor. ``k_weight``, ``q_bias`` and
            ``k_bias`` likewise.
        k_weight: of the keys.
        q_bias: of the queries.
        k_bias: of the keys.
        cos: ``[B or 1, L, H or 1, R / 2]``: one value per rotated pair, the first R <= D channels of a head are
            rotated; L is the number of rotated tokens. None with ``sin``: no rotation (cross-attention).
        sin: as ``cos``.
        eps: added to the mean square (the variance).
        kind: ``"rms"``, or ``"layer"`` with a mean.
        across_heads: one statistic per token (Wan, LTX), or one per head (HunyuanVideo, CogVideoX).
        interleaved: pairs are neighbours ``(2 i, 2 i + 1)``; else halves, ``(i, i + R / 2)``.
        rope_tokens: ``(start, stop)``: only these tokens are rotated (text stands beside video). None: all.

    Returns:
        ``q'``, or ``(q', k')``: contiguous, in their own dtypes.

    Raises:
        ValueError: wrong shapes, devices, interval, kind or eps; a cos or sin that wants a gradient.
        TypeError: no float dtype.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind: expected 'rms' or 'layer', got {kind!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number that is not negative, got {eps}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    named = [("q", q, q_weight, q_bias)] if k is None else [("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)]
    prepared = []
    for name, x, weight, bias in named:
        x = _check(name, x)
        start, stop = (0, x.shape[1]) if rope_tokens is None else rope_tokens
        if not 0 <= start <= stop <= x.shape[1]:
            raise ValueError(f"rope_tokens: expected 0 <= start <= stop <= {x.shape[1]} ({name}), got {rope_tokens}")
        angles: tuple[Tensor | None, Tensor | None] = (None, None)
        if cos is not None and sin is not None:
            angles = _check_angles("cos", cos, x, stop - start), _check_angles("sin", sin, x, stop - start)
            if cos.shape != sin.shape:
                raise ValueError(f"sin: expected the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
            if angles[0] is not None and angles[1] is not None and angles[0].stride() != angles[1].stride():
                angles = angles[0].contiguous(), angles[1].contiguous()
        weight = _check_parameter(f"{name}_weight", weight, x, across_heads)
        bias = _check_parameter(f"{name}_bias", bias, x, across_heads)
        prepared.append((x, weight, bias, *angles, start))
    results = []
    for x, weight, bias, own_cos, own_sin, start in prepared:
        kept_output = not torch.compiler.is_compiling() and can_undo(
            weight,
            bias,
            pairs=0 if own_cos is None or not own_cos.numel() else own_cos.shape[3],
            dim=x.shape[3],
            interleaved=interleaved,
        )
        made = torch.ops.prfl_fast.qk_norm_rope(
            x, weight, bias, own_cos, own_sin, float(eps), kind == "rms", across_heads, interleaved, start,
            kept_output, row_backend(x),
        )  # fmt: skip
        results.append(made[0])
    return results[0] if k is None else (results[0], results[1])
