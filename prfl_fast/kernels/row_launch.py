"""Launches of the row kernels; arguments as the torch ops in `prfl_fast/ops/rows/registration.py` have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from prfl_fast.kernels.columns import column_sum
from prfl_fast.kernels.configurations import Launch, chunk_of, shape_of
from prfl_fast.kernels.rows import launch_for, row_backward_kernel, row_forward_kernel

# Programs per multiprocessor of a backward that sums columns: one wave of blocks of 8 warps.
_PROGRAMS = 2
# Rows a program of a backward without column sums: few, for balance.
_ROWS = 4


def _compute(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _strides(tensor: Tensor | None, *, rows: bool = False) -> tuple[int, int]:
    """Of sample and row; ``rows``: 0 for the row where there is one per sample."""
    if tensor is None:
        return 0, 0
    return tensor.stride(0), 0 if rows and tensor.shape[1] == 1 else tensor.stride(1)


def _starts(segments: Sequence[int]) -> tuple[int, ...]:
    return (0, *list(accumulate(segments))[:-1]) if segments else (0,)


def _by_segment(modulation: Tensor | None, segments: Sequence[int]) -> bool:
    return modulation is not None and len(segments) > 1 and modulation.shape[1] == len(segments)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    segments: Sequence[int],
    eps: float,
    rms: bool,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `prfl_fast.ops.rows.reference.forward`."""
    batch, length, channels = x.shape
    dtype, T = _compute(x)
    empty = x.new_empty(0)
    stream = torch.empty(x.shape, dtype=x.dtype, device=x.device) if y is not None else empty
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if normed else empty
    rstd = torch.empty(batch, length, dtype=dtype, device=x.device) if normed else empty
    mean = torch.empty_like(rstd) if normed and not rms else empty.to(dtype)
    if not x.numel():
        return stream, out, mean, rstd
    launch = launch_for(channels, backward=False)
    with torch.cuda.device_of(x):
        row_forward_kernel[(length, batch)](
            x, y, gate, scale, shift, weight, bias, stream, out, mean, rstd,
            _strides(x), _strides(y), _strides(gate, rows=True), _strides(scale, rows=True), _strides(shift, rows=True),
            length, _starts(segments), eps,
            C=channels, BLOCK=launch.block, CHUNKS=launch.chunks, T=T,
            HAS_Y=y is not None, HAS_GATE=gate is not None, HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_NORM=normed, RMS=rms,
            GATE_SEGMENTS=_by_segment(gate, segments), SCALE_SEGMENTS=_by_segment(scale, segments),
            SHIFT_SEGMENTS=_by_segment(shift, segments), num_warps=launch.num_warps,
            maxnreg=launch.registers if T is tl.float32 else None,
        )  # fmt: skip
    return stream, out, mean, rstd


def backward(
    stream: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift_rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    d_stream: Tensor | None,
    d_out: Tensor | None,
    segments: Sequence[int],
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """As `prfl_fast.ops.rows.reference.backward`, each gradient in its entry of ``dtypes``; None: not wanted.

    The gradient of y is wanted with a gate only: without one it is that of x.
    """
    batch, length, channels = stream.shape
    dtype, T = _compute(stream)
    rows = (0, 0, gate.shape[1] if gate is not None else 0, scale.shape[1] if scale is not None else 0, shift_rows)
    wanted = [kind is not None for kind in dtypes]
    tokens = [number >= 2 and number < 5 and rows[number] == length > 1 for number in range(7)]
    summed = [wanted[number] and number >= 2 and not tokens[number] for number in range(7)]

    per_program = max(1, -(-length // (_PROGRAMS * _multiprocessors(stream.device)))) if any(summed) else _ROWS
    runs = list(segments) or [length]
    firsts = (0, *accumulate(-(-run // per_program) for run in runs))
    programs = firsts[-1]

    buffers: list[Tensor | None] = [None] * 7
    for number, kind in enumerate(dtypes):
        if kind is not None:
            shape = (batch, programs, channels) if summed[number] else stream.shape
            kind = dtype if summed[number] else kind
            buffers[number] = torch.empty(shape, dtype=kind, device=stream.device)
    if stream.numel():
        launch = launch_for(channels, backward=True, sums=any(summed))
        with torch.cuda.device_of(stream):
            row_backward_kernel[(programs, batch)](
                stream, y, gate, scale, weight, bias, mean, rstd, d_stream, d_out, *buffers,
                _strides(stream), _strides(y), _strides(gate, rows=True), _strides(scale, rows=True),
                _strides(d_stream), _strides(d_out),
                length, _starts(segments), firsts[:-1], per_program,
                C=channels, BLOCK=launch.block, CHUNKS=launch.chunks, T=T,
                HAS_GATE=gate is not None, HAS_SCALE=scale is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, HAS_NORM=d_out is not None, RMS=mean is None,
                HAS_D_STREAM=d_stream is not None, GATE_SEGMENTS=_by_segment(gate, segments),
                SCALE_SEGMENTS=_by_segment(scale, segments),
                NEED_X=wanted[0], NEED_Y=wanted[1], NEED_GATE=wanted[2], NEED_SCALE=wanted[3], NEED_SHIFT=wanted[4],
                NEED_WEIGHT=wanted[5], NEED_BIAS=wanted[6],
                GATE_TOKENS=tokens[2], SCALE_TOKENS=tokens[3], SHIFT_TOKENS=tokens[4], num_warps=launch.num_warps,
                maxnreg=launch.registers if T is tl.float32 else None,
            )  # fmt: skip
    for number, kind in enumerate(dtypes):
        partial = buffers[number]
        if kind is None or partial is None or not summed[number]:
            continue
        if number >= 5:
            flat = partial.reshape(1, batch * programs, channels)
            buffers[number] = column_sum(flat, (0, batch * programs), kind).reshape(channels)
        else:
            whole = len(segments) <= 1 or rows[number] != len(segments)
            buffers[number] = column_sum(partial, (0, programs) if whole else firsts, kind)
    return buffers


@dataclass(frozen=True)
class _Model:
    """How a family modulates its tokens; ``rows``: one modulation per sample, segment or token."""

    name: str
    channels: int
    modulation: torch.dtype = torch.bfloat16
    rms: bool = False
    affine: bool = False
    rows: str = "sample"


_MODELS = (
    _Model("Wan 1.3B", 1536, torch.float32),
    _Model("Wan 14B", 5120, torch.float32),
    _Model("Wan 5B", 3072, torch.float32, rows="token"),
    _Model("HunyuanVideo", 3072),
    _Model("HunyuanVideo token-replace", 3072, rows="segment"),
    _Model("LTX-Video", 2048, rms=True),
    _Model("CogVideoX 2B", 1920, affine=True, rows="segment"),
    _Model("CogVideoX 5B", 3072, affine=True, rows="segment"),
)


def production(architecture: int) -> Iterator[Launch]:
    """Blocks of the four families: forward, backward with every gradient, backward under LoRA (modulation frozen)."""
    for model in _MODELS:
        yield from _production(model, "")
        if model.name.startswith("Wan"):
            # The norm in front of cross-attention has a weight and a bias and no modulation.
            yield from _production(replace(model, name=f"{model.name} cross", affine=True), "plain")


def _production(model: _Model, kind: str) -> Iterator[Launch]:
    length, channels = 32760, model.channels
    rows = {"sample": 1, "segment": 2, "token": length}[model.rows]
    segments = (226, length - 226) if model.rows == "segment" else ()
    x = shape_of(1, length, channels)
    chunk = chunk_of(6, 1, rows, channels, dtype=model.modulation)
    factor = None if kind == "plain" else chunk
    own = shape_of(channels) if model.affine else None
    statistic = shape_of(1, length, dtype=torch.float32)
    mean = None if model.rms else statistic
    narrow, wide = x.dtype, model.modulation
    for op in ("modulated_norm", "gated_residual", "gated_residual_norm"):
        if kind == "plain" and op != "gated_residual_norm":
            continue
        gated, normed = op != "modulated_norm", op != "gated_residual"
        y, gate = (x, chunk) if gated else (None, None)
        scale, weight = (factor, own) if normed else (None, None)
        yield Launch(
            op, f"{model.name} {channels} forward",
            partial(forward, x, y, gate, scale, scale, weight, weight, segments, 1e-6, model.rms, normed),
        )  # fmt: skip
        for trained in (True, False):
            gate_dtype = wide if trained and gated else None
            scale_dtype = wide if trained and scale is not None else None
            weight_dtype = narrow if trained and weight is not None else None
            dtypes = (
                narrow if normed else None, narrow if gated else None, gate_dtype, scale_dtype, scale_dtype,
                weight_dtype, weight_dtype,
            )  # fmt: skip
            yield Launch(
                op, f"{model.name} {channels} backward{'' if trained else ' frozen'}",
                partial(
                    backward, x, y if trained else None, gate, scale, rows if scale is not None else 0, weight,
                    weight if scale_dtype else None, mean if normed else None, statistic if normed else None,
                    x if gated else None, x if normed else None, segments, dtypes,
                ),
            )  # fmt: skip
