"""Gated residual and the modulated norm of the new stream: ours beside the formula of Wan's block, eager and compiled.

Tokens in bfloat16 on a GPU, gate, scale and shift in float32, one row a sample, all of them with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_fast.benchmarks import glue
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.ops import gated_residual_norm

EPS = 1e-6


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"eps": EPS, "seconds_per_measurement": setting.seconds}


def exact(residual: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """The formula."""
    stream = residual + y * gate
    return stream, F.layer_norm(stream, stream.shape[-1:], eps=EPS) * (1 + scale) + shift


def plain(residual: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """The formula with the casts of Wan's block."""
    stream = (residual.float() + y * gate).type_as(residual)
    normed = F.layer_norm(stream.float(), stream.shape[-1:], eps=EPS) * (1 + scale) + shift
    return stream, normed.type_as(stream)


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other."""
    for name, shape, dtype in glue.problems(setting):
        drawing = glue.Drawing(setting)
        batch, tokens, dim = shape
        residual, y = (drawing.leaf(*shape, dtype=dtype) for _ in range(2))
        gate, scale, shift = (drawing.leaf(batch, 1, dim, dtype=torch.float32, std=0.3) for _ in range(3))
        inputs = (residual, y, gate, scale, shift)
        # Rounded on the way: the stream, the result and the gradient, and float32 sums over tokens or channels.
        roundings = 6 + math.sqrt(max(tokens, dim)) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps

        def forward(inputs: tuple[Tensor, ...] = inputs) -> tuple[Tensor, ...]:
            return gated_residual_norm(*inputs, eps=EPS)

        cotangents = tuple(drawing.plain(*shape, dtype=dtype) for _ in range(2))
        yield from glue.contest(
            "gated_residual_norm", name, shape, dtype, setting, inputs, cotangents, forward, plain, exact,
            {"forward": 4, "backward": 6}, roundings,
        )  # fmt: skip
