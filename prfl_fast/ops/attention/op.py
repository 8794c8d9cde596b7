"""Attention as users call it: checks and the choice of kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from prfl_fast.ops.attention import registration as _registration  # noqa: F401 (registers the torch ops)
from prfl_fast.ops.attention.choice import choose
from prfl_fast.ops.attention.provider import Problem
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
    """``softmax(scale q k^T) v`` by the best kernel that is there, its log-sum-exp beside it (arXiv 2205.14135).

    The op is ``prfl_fast::attention``: a selective checkpoint policy that keeps it keeps output and log-sum-exp, and
    its backward takes them, so that recomputation runs no attention again. Differentiable once.

    Args:
        q: ``[B, Lq, H, D]``, any float dtype and strides.
        k: ``[B, Lk, H, D]``, Lk at least 1.
        v: ``[B, Lk, H, D]``.
        scale: of the scores; ``D ** -0.5`` by default.
        kv_lengths: ``[B]`` integers, the keys that count per sample, from the front; what lies behind is never read and
            has gradients of zero. Read on the host: give a list or a CPU tensor to avoid a synchronisation.
        deterministic: the backward gives the same bits in every run.
        return_lse: also give the log-sum-exp of the scaled scores (natural logarithm).

    Returns:
        ``[B, Lq, H, D]`` in the dtype of ``q``; with ``return_lse`` also ``[B, H, Lq]``, float32 (float64 for float64).

    Raises:
        ValueError: wrong shapes, devices or lengths.
        TypeError: wrong dtypes.
    """
    _check(q, k, v)
    lengths = None if kv_lengths is None else _read_lengths(kv_lengths, k)
    if lengths is not None and len(set(lengths)) == 1:
        # One slice, and its gradient's padding, for all.
        k, v = k[:, : lengths[0]], v[:, : lengths[0]]
        lengths = None
    problem = Problem.of(q, k, deterministic)
    out, lse = torch.ops.prfl_fast.attention(
        q, k, v, 1 / math.sqrt(q.shape[3]) if scale is None else float(scale), lengths, deterministic,
        choose(problem, backward=False), choose(problem, backward=True),
    )  # fmt: skip
    return (out, lse) if return_lse else out
