"""Attention in Triton, forward and backward, on tensors: shapes, launches, the split over queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from prfl_fast.kernels.attention_backward import (
    attention_add_kernel,
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
)
from prfl_fast.kernels.attention_forward import attention_forward_kernel
from prfl_fast.kernels.attention_settings import ADDED, DELTA_ROWS, Chip, settings, splits_for
from prfl_fast.kernels.configurations import Launch, shape_of

_LOG2_E = 1 / math.log(2)
# A tile of at most 256 rows is addressed in int32.
_LONGEST_ROW = 2**31 // 256


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last stride is not 1 or its rows lie too far apart for a tile."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(1) < _LONGEST_ROW else tensor.contiguous()


def _chip_of(tensor: Tensor) -> Chip:
    if not tensor.is_cuda:
        return Chip(0, 1)
    properties = torch.cuda.get_device_properties(tensor.device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def _columns(dim: int) -> int:
    """Columns of a tile: the head dimension, padded to a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, chip: Chip | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp, natural logarithm (arXiv 2205.14135).

    Args:
        q: ``[B, Lq, H, D]``, float16, bfloat16 or float32, any strides (copied where the last is not 1); D up to 256.
        k: ``[B, Lk, H, D]``, Lk at least 1.
        v: ``[B, Lk, H, D]``.
        scale: of the scores.
        chip: the device to be laid out for, that of the tensors by default.

    Returns:
        ``[B, Lq, H, D]`` in the dtype of q, and ``[B, H, Lq]`` in float32, contiguous.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    launch = settings(chip or _chip_of(q), dim, q.element_size(), "forward")
    with torch.cuda.device_of(q):
        attention_forward_kernel[(triton.cdiv(queries, launch.block_m) * batch * heads,)](
            q, k, v, out, lse, q.stride()[:3], k.stride()[:3], v.stride()[:3],
            queries, keys, heads, abs(scale) * _LOG2_E,
            D=dim, COLUMNS=_columns(dim), BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, NEGATIVE=scale < 0,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    d_lse: Tensor | None = None,
    splits: int | None = None,
    chip: Chip | None = None,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v; the same bits in every run on one kind of device.

    Args:
        d_out: ``[B, Lq, H, D]``.
        q: as in the forward, as k, v and scale.
        k: see q.
        v: see q.
        out: result of the forward, ``[B, Lq, H, D]``.
        lse: the other result, ``[B, H, Lq]``.
        scale: of the scores.
        d_lse: gradient of ``lse``, ``[B, H, Lq]``.
        splits: runs of queries that dk and dv are summed over apart; by default as many as fill the device. Their
            sums differ in the last bits of float32 from those of another number.
        chip: the device to be laid out for, that of the tensors by default.
        needed: which of the gradients of q, k and v; those of k and v come from one kernel.

    Returns:
        Gradients, contiguous, in the dtypes of q, k and v; None for those that are not needed.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    q, k, v, out, d_out = _readable(q), _readable(k), _readable(v), _readable(out), _readable(d_out)
    lse = lse.contiguous()
    if d_lse is not None:
        d_lse = d_lse.to(torch.float32).contiguous()
    delta = torch.empty_like(lse)
    tile = {"D": dim, "COLUMNS": _columns(dim)}
    tensors = (q, k, v, d_out, lse, delta)
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], d_out.stride()[:3])
    chip = chip or _chip_of(q)
    dq = dk = dv = None
    with torch.cuda.device_of(q):
        attention_delta_kernel[(triton.cdiv(queries, DELTA_ROWS) * batch * heads,)](
            out, d_out, d_lse, delta, out.stride()[:3], d_out.stride()[:3],
            queries, heads, **tile, BLOCK_M=DELTA_ROWS, HAS_D_LSE=d_lse is not None, num_warps=4,
        )  # fmt: skip
        if needed[0]:
            dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            launch = settings(chip, dim, q.element_size(), "dq")
            attention_dq_kernel[(triton.cdiv(queries, launch.block_m) * batch * heads,)](
                *tensors, dq, *strides, queries, keys, heads, scale, scale * _LOG2_E,
                **tile, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
        if needed[1] or needed[2]:
            dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in "kv")
            launch = settings(chip, dim, q.element_size(), "dkdv")
            programs = triton.cdiv(keys, launch.block_n) * batch * heads
            tiles = triton.cdiv(queries, launch.block_m)
            splits = min(splits_for(chip, programs, queries) if splits is None else splits, tiles)
            per_split = triton.cdiv(tiles, splits) * launch.block_m
            splits = triton.cdiv(queries, per_split)
            parts = (dk, dv)
            if splits > 1:
                parts = tuple(torch.empty(splits, *k.shape, dtype=torch.float32, device=k.device) for _ in "kv")
            attention_dkdv_kernel[(programs, splits)](
                *tensors, *parts, *strides, queries, keys, heads, batch, per_split, scale, scale * _LOG2_E,
                **tile, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
            if splits > 1:
                for part, total in zip(parts, (dk, dv), strict=True):
                    attention_add_kernel[(triton.cdiv(total.numel(), ADDED),)](
                        part, total, total.numel(), splits, BLOCK=ADDED, num_warps=4
                    )
    return dq, dk if needed[1] else None, dv if needed[2] else None


@dataclass(frozen=True)
class _Model:
    """Attention of a family at 81 frames and 480p; ``text``: keys of its cross-attention, 0 where it has none."""

    name: str
    heads: int
    dim: int
    text: int


_MODELS = (
    _Model("Wan 1.3B", 12, 128, 512),
    _Model("Wan 14B", 40, 128, 512),
    _Model("HunyuanVideo", 24, 128, 0),
    _Model("LTX-Video", 32, 64, 256),
    _Model("CogVideoX 5B", 48, 64, 0),
)
_PROCESSORS = {80: 108, 90: 132, 100: 148}


def production(architecture: int) -> Iterator[Launch]:
    """Self-attention and cross-attention of the families, forward and backward."""
    chip = Chip(architecture, _PROCESSORS[architecture])
    for model in _MODELS:
        for name, keys in (("self", 32760), ("cross", model.text)):
            if not keys:
                continue
            q, k = (shape_of(1, length, model.heads, model.dim) for length in (32760, keys))
            lse = shape_of(1, model.heads, 32760, dtype=torch.float32)
            scale = model.dim**-0.5
            label = f"{model.name} {model.heads}x{model.dim} {name}"
            yield Launch("attention", f"{label} forward", partial(forward, q, k, k, scale, chip))
            yield Launch("attention", f"{label} backward", partial(backward, q, q, k, k, q, lse, scale, chip=chip))
