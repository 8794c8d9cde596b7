"""Scale, shift and gate in the shapes that diffusers hands out, as one shape ``[B, R, C]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# More runs than this are spelled out per token: a kernel compares each row with every run's start.
MAX_SEGMENTS = 8


def check_segments(segments: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """Run lengths as a tuple; empty where all tokens are one run.

    Raises:
        ValueError: runs that are not positive integers or do not sum to ``length``.
    """
    if segments is None:
        return ()
    runs = tuple(segments)
    if not runs or not all(type(run) is int and run > 0 for run in runs) or sum(runs) != length:
        raise ValueError(f"segments: expected positive run lengths that sum to {length} tokens, got {runs}")
    return runs


def view_modulation(name: str, tensor: Tensor | None, x: Tensor, segments: tuple[int, ...]) -> Tensor | None:
    """``tensor`` as ``[B, R, C]``: R is 1 (per sample), the number of segments, or L (per token).

    Args:
        name: the argument's name, for errors.
        tensor: ``[B, C]``, ``[B, 1, C]``, ``[B, L, C]`` or ``[B, G, C]``, B may be 1; any float dtype and strides.
        x: the tokens ``[B, L, C]``.
        segments: G run lengths, or empty.

    Raises:
        ValueError: another shape or device.
        TypeError: no float dtype.
    """
    if tensor is None:
        return None
    batch, length, channels = x.shape
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of the tokens, {x.device}, got {tensor.device}")
    groups = len(segments)
    allowed = {1, length} | ({groups} if groups else set())
    wide = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
    if (
        wide.ndim != 3
        or wide.shape[0] not in (1, batch)
        or wide.shape[1] not in allowed
        or wide.shape[2] != channels
    ):
        shapes = f"[{batch}, {channels}], [{batch}, 1, {channels}] or [{batch}, {length}, {channels}]"
        if groups:
            shapes += f", or [{batch}, {groups}, {channels}] with {groups} segments"
        raise ValueError(f"{name}: expected shape {shapes}, got {tuple(tensor.shape)}")
    if wide.shape[0] != batch:
        wide = wide.expand(batch, -1, -1)
    if groups > MAX_SEGMENTS and wide.shape[1] == groups != length:
        runs = torch.tensor(segments, device=wide.device)
        wide = torch.repeat_interleave(wide, runs, dim=1, output_size=length)
    return unit_stride(wide)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last stride is 1, else a copy: kernels read whole sectors of a row."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def kernel_segments(segments: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The runs that kernels have to tell apart: none where they are one, one token each, or too many."""
    return segments if 1 < len(segments) <= MAX_SEGMENTS and len(segments) != length else ()


def per_row(modulation: Tensor, length: int, segments: Sequence[int]) -> Tensor:
    """``[B, R, C]`` as something that broadcasts over ``[B, L, C]``."""
    if len(segments) > 1 and modulation.shape[1] == len(segments):
        runs = torch.tensor(segments, device=modulation.device)
        return torch.repeat_interleave(modulation, runs, dim=1, output_size=length)
    return modulation


def sum_rows(gradient: Tensor, rows: int, segments: Sequence[int]) -> Tensor:
    """``[B, L, C]`` summed to ``[B, R, C]``: the transpose of :func:`per_row` and its broadcast."""
    if len(segments) > 1 and rows == len(segments):
        return torch.stack([run.sum(1) for run in gradient.split(list(segments), dim=1)], dim=1)
    return gradient.sum(1, keepdim=True) if rows == 1 else gradient
