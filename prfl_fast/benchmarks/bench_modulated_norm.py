"""LayerNorm with AdaLN modulation: ours beside the formula of Wan's block, eager and compiled.

Tokens in bfloat16 on a GPU, scale and shift in float32, one row a sample, all of them with a gradient.
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
from prfl_fast.ops import modulated_norm

EPS = 1e-6


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"eps": EPS, "seconds_per_measurement": setting.seconds}


def exact(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """The formula."""
    return (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift,)


def plain(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """The formula with the casts of Wan's block."""
    return (exact(x.float(), scale, shift)[0].type_as(x),)


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other."""
    for name, shape, dtype in glue.problems(setting):
        drawing = glue.Drawing(setting)
        batch, tokens, dim = shape
        x = drawing.leaf(*shape, dtype=dtype)
        scale, shift = (drawing.leaf(batch, 1, dim, dtype=torch.float32, std=0.3) for _ in range(2))
        # Rounded on the way: the result and the gradient, and float32 sums over tokens or channels.
        roundings = 4 + math.sqrt(max(tokens, dim)) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps

        def forward(x: Tensor = x, scale: Tensor = scale, shift: Tensor = shift) -> tuple[Tensor, ...]:
            return (modulated_norm(x, scale, shift, eps=EPS),)

        yield from glue.contest(
            "modulated_norm", name, shape, dtype, setting, (x, scale, shift), (drawing.plain(*shape, dtype=dtype),),
            forward, plain, exact, {"forward": 2, "backward": 3}, roundings,
        )  # fmt: skip
