"""Attention as users call it: checks and the choice of kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from prfl_fast.ops.attention import registration as _registration  # noqa: F401 (registers the torch ops)
from prfl_fast.ops.attention.choice import names
from prfl_fast.ops.dtypes import NUMBERS


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or not tensor.shape[3]:
            raise ValueError(f"{name}: expected [B, L, heads, head dimension], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in NUMBERS or tensor.dtype != q.dtype:
            raise TypeError(
                f"{name}: expected one dtype of float32, float64, float16 and bfloat16 for q, k and v, "
                f"got {tensor.dtype}" + ("" if name == "q" else f" beside {q.dtype}")
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
    batch, _, heads, dim = q.shape
    if k.shape != (batch, k.shape[1], heads, dim) or not k.shape[1]:
        raise ValueError(f"k: expected [{batch}, at least 1, {heads}, {dim}], got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")


def _read_lengths(lengths: Tensor | Sequence[int], k: Tensor) -> list[int]:
    if isinstance(lengths, Tensor) and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"kv_lengths: expected integers, got {lengths.dtype}")
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not isinstance(values, list) or len(values) != k.shape[0]:
        raise ValueError(f"kv_lengths: expected one per sample ({k.shape[0]}), got {values}")
    if not all(type(value) is int and 1 <= value <= k.shape[1] for value in values):
        raise ValueError(f"kv_lengths: expected integers in 1..{k.shape[1]}, got {values}")
    return values


def _read_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    return float(scale)


def _as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of autocast, where it is on, as torch's own attention; float64 stays."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    made = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)]
    return made[0], made[1], made[2]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., kv_lengths: Tensor | Sequence[int] | None = ...,
    deterministic: bool = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., kv_lengths: Tensor | Sequence[int] | None = ...,
    deterministic: bool = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | Sequence[int] | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` by the fastest kernel that is there, its log-sum-exp beside it (arXiv 2205.14135).

    On a GPU the installed kernels are tried when a kind of problem is met first (about a second, once a machine);
    :func:`prfl_fast.ops.attention_provider` names one instead, ``prfl-fast doctor`` shows them and what was measured.

    The op is ``prfl_fast::attention``: a selective checkpoint policy that keeps it keeps output and log-sum-exp, and
    its backward takes them, so that recomputation runs no attention again. Differentiable once.

    Args:
        q: ``[B, Lq, H, D]``, any float dtype and strides. Under autocast all three are cast, as by torch's own.
        k: ``[B, Lk, H, D]``, Lk at least 1.
        v: ``[B, Lk, H, D]``.
        scale: of the scores; ``D ** -0.5`` by default.
        kv_lengths: ``[B]`` integers, the keys that count per sample, from the front; what lies behind is never read and
            has gradients of zero. Read on the host: give a list or a CPU tensor to avoid a synchronisation.
        deterministic: the backward gives the same bits in every run; so under torch.use_deterministic_algorithms.
        return_lse: also give the log-sum-exp of the scaled scores (natural logarithm).

    Returns:
        ``[B, Lq, H, D]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, Lq]``, float32 (float64 for float64).

    Raises:
        ValueError: wrong shapes, devices, lengths or scale.
        TypeError: wrong dtypes.
        RuntimeError: the kernels that were named can't run this.
    """
    q, k, v = _as_autocast(q, k, v)
    _check(q, k, v)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else _read_scale(scale)
    lengths = None if kv_lengths is None else _read_lengths(kv_lengths, k)
    if lengths is not None and len(set(lengths)) <= 1:
        # One slice, and its gradient's padding, for all.
        length = lengths[0] if lengths else k.shape[1]
        k, v, lengths = k[:, :length], v[:, :length], None
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    forward, backward = names(q, k, deterministic)
    out, lse = torch.ops.prfl_fast.attention(q, k, v, scale, lengths, deterministic, forward, backward)
    return (out, lse) if return_lse else out
