"""Attention pooling of the reward: ours beside ``nn.MultiheadAttention``, which the published reward calls.

One learned query with 8 heads over all tokens of a video; gradients of the tokens, the query and every parameter. The
published code calls the module with its defaults, which also give the attention weights back; a second row is the same
module without them, which takes torch's fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.benchmarks.contest import Contest, Contestant, ours
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.ops import query_pool

HEADS = 8
# Tokens [B, L, C] of Wan 2.1 at 81 frames, of the 1.3B and the 14B model; scaled down for a CPU.
SHAPES = {
    "cuda": {
        "1.3B 480p": (1, 32_760, 1536),
        "1.3B 720p": (1, 75_600, 1536),
        "14B 480p": (1, 32_760, 5120),
        "14B 720p": (1, 75_600, 5120),
    },
    "cpu": {"1.3B 480p, a sixth of the tokens": (1, 5_460, 1536), "batch of two": (2, 4_096, 512)},
    "tiny": {"tiny": (2, 65, 32)},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"queries": 1, "heads": HEADS, "seconds_per_measurement": setting.seconds}


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other."""
    device = torch.device(setting.device)
    for name, shape in SHAPES["tiny" if setting.tiny else setting.kind].items():
        yield from contest(name, shape, DTYPES[setting.kind], device).rows(setting)


def bytes_moved(shape: tuple[int, int, int], itemsize: int) -> dict[str, int]:
    """Tokens and parameters read once; backward: both read and their gradients written. The rest is too small."""
    batch, tokens, dim = shape
    once = itemsize * (batch * tokens * dim + 4 * dim * dim)
    return {"forward": once, "backward": 2 * once}


def contest(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Contest:
    """Random tokens and parameters, and what is right for them."""
    batch, tokens, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(sizes, device=device, generator=generator)).to(dtype).requires_grad_()

    x, queries = draw(*shape), draw(1, dim)
    in_weight, in_bias = draw(3 * dim, dim, std=dim**-0.5), draw(3 * dim, std=0.1)
    out_weight, out_bias = draw(dim, dim, std=dim**-0.5), draw(dim, std=0.1)
    inputs = (x, queries, in_weight, in_bias, out_weight, out_bias)
    cotangent = torch.randn(batch, 1, dim, device=device, generator=generator).to(dtype)

    def forward() -> tuple[Tensor, ...]:
        return (query_pool(*inputs, num_heads=HEADS),)

    def peer(weights: bool) -> Contestant:
        name = "nn.MultiheadAttention" if weights else "nn.MultiheadAttention, need_weights=False"
        return Contestant(name, lambda: lambda: (attention(inputs, weights),), roundings, dtype)

    expected = exact(inputs, cotangent)
    # Rounded on the way: query, key, score, softmax, value, mean, result, and as many backward. Sums over the tokens
    # or the width are kept in float32 and wander by the root of their length.
    wander = math.sqrt(max(tokens, dim)) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    roundings = 14 + wander
    return Contest(
        {"op": "query_pool", "shape": name, "sizes": list(shape), "dtype": str(dtype).removeprefix("torch.")},
        device,
        inputs,
        (cotangent,),
        expected,
        [float(torch.linalg.vector_norm(t)) for t in expected],
        bytes_moved(shape, dtype.itemsize),
        (*ours(("triton", "reference"), forward, device, roundings), peer(True), peer(False)),
    )


def attention(parameters: Sequence[Tensor], weights: bool) -> Tensor:
    """What ``nn.MultiheadAttention(C, 8, batch_first=True)(queries, x, x)`` computes, with these parameters."""
    x, queries, in_weight, in_bias, out_weight, out_bias = parameters
    dim = x.shape[2]
    module = nn.MultiheadAttention(dim, HEADS, batch_first=True, device="meta", dtype=x.dtype)
    named = {
        "in_proj_weight": in_weight,
        "in_proj_bias": in_bias,
        "out_proj.weight": out_weight,
        "out_proj.bias": out_bias,
    }
    query = queries.expand(x.shape[0], *queries.shape)
    pooled: Tensor = torch.func.functional_call(module, named, (query, x, x), {"need_weights": weights})[0]
    return pooled


def exact(inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Result and gradients of the module in float64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    result = attention(wide, weights=False)
    return [result.detach(), *torch.autograd.grad(result, wide, cotangent.double())]
