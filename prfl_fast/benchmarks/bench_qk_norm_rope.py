"""RMSNorm of queries and keys across heads and their rotary embedding: ours beside Wan's formula, eager and compiled.

Tokens in bfloat16 on a GPU; the norms' weights have a gradient, too.
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
from prfl_fast.ops import qk_norm_rope

EPS = 1e-6
HEAD_DIM = 128


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"eps": EPS, "head_dim": HEAD_DIM, "seconds_per_measurement": setting.seconds}


def _one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm, then the pairs turned, as Wan's attention processor writes it."""
    normed = F.rms_norm(x.flatten(2), (weight.shape[0],), weight, EPS).unflatten(2, x.shape[2:])
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(normed)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other."""
    for name, shape, dtype in glue.problems(setting):
        drawing = glue.Drawing(setting)
        batch, tokens, dim = shape
        head_dim = min(HEAD_DIM, dim // 2)
        sizes = (batch, tokens, dim // head_dim, head_dim)
        q, k = (drawing.leaf(*sizes, dtype=dtype) for _ in range(2))
        q_weight, k_weight = (drawing.leaf(dim, dtype=dtype, std=0.1, mean=1.0) for _ in range(2))
        angles = drawing.plain(1, tokens, 1, head_dim // 2, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()
        inputs = (q, k, q_weight, k_weight)
        # Rounded on the way: normed, result, gradient (the kept result is turned back), and float32 sums.
        roundings = 8 + math.sqrt(max(tokens, dim)) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps

        def forward(
            inputs: tuple[Tensor, ...] = inputs, cos: Tensor = cos, sin: Tensor = sin
        ) -> tuple[Tensor, ...]:
            q, k, q_weight, k_weight = inputs
            return qk_norm_rope(q, k, q_weight, k_weight, cos=cos, sin=sin, eps=EPS)

        def plain(
            q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor = cos, sin: Tensor = sin
        ) -> tuple[Tensor, ...]:
            return _one(q, q_weight, cos, sin), _one(k, k_weight, cos, sin)

        cotangents = tuple(drawing.plain(*sizes, dtype=dtype) for _ in range(2))
        yield from glue.contest(
            "qk_norm_rope", name, shape, dtype, setting, inputs, cotangents, forward, plain, plain,
            {"forward": 4, "backward": 6}, roundings,
        )  # fmt: skip
