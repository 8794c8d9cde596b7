"""What the benchmarks of a block's glue share: shapes, tokens, and peers that are plain functions.

Every peer computes what the diffusers block of Wan writes, with its casts; torch.compile gets the same function.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prfl_fast.benchmarks.contest import AbsentError, Contest, Contestant, Forward, ours
from prfl_fast.benchmarks.registry import Row, Setting

# Tokens [B, L, C] of one block at 81 frames; scaled down for a CPU.
SHAPES = {
    "cuda": {
        "Wan 1.3B 480p": (1, 32_760, 1536),
        "Wan 1.3B 720p": (1, 75_600, 1536),
        "Wan 14B 480p": (1, 32_760, 5120),
        "Wan 14B 720p": (1, 75_600, 5120),
    },
    "cpu": {"Wan 1.3B, 2,048 tokens": (1, 2_048, 1536)},
    "tiny": {"tiny": (2, 33, 64)},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Kernels of others for a plain norm, without modulation: named, so that their absence shows.
PEERS = ("liger_kernel", "quack")

Plain = Callable[..., tuple[Tensor, ...]]


class Drawing:
    """Random leaves of one problem."""

    def __init__(self, setting: Setting) -> None:
        self.device = torch.device(setting.device)
        self._generator = torch.Generator(self.device).manual_seed(0)

    def leaf(self, *sizes: int, dtype: torch.dtype, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal numbers that want a gradient."""
        return self.plain(*sizes, dtype=dtype, std=std, mean=mean).requires_grad_()

    def plain(self, *sizes: int, dtype: torch.dtype, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal numbers."""
        drawn = torch.randn(sizes, device=self.device, generator=self._generator)
        return (mean + std * drawn).to(dtype)


def problems(setting: Setting) -> Iterator[tuple[str, tuple[int, int, int], torch.dtype]]:
    """Name, shape and dtype of each."""
    for name, shape in SHAPES["tiny" if setting.tiny else setting.kind].items():
        yield name, shape, DTYPES[setting.kind]


def contest(
    op: str,
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    setting: Setting,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    forward: Forward,
    plain: Plain,
    exact: Plain,
    moved: dict[str, int],
    roundings: float,
) -> Iterator[Row]:
    """Rows of our backends, of ``plain(*inputs)`` and of what torch.compile makes of it.

    ``exact`` is the same in whatever dtype it is given, for float64. ``moved`` counts units of ``[B, L, C]``.
    """
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results = exact(*wide)
    gradients = torch.autograd.grad(results, wide, [g.double() for g in cotangents])
    expected = [*(result.detach() for result in results), *gradients]
    unit = shape[0] * shape[1] * shape[2] * dtype.itemsize
    device = torch.device(setting.device)
    contestants = [
        *ours(("triton", "reference"), forward, device, roundings),
        Contestant("diffusers' formula", lambda: lambda: plain(*inputs), roundings, dtype),
        Contestant("torch.compile", lambda: compiled(plain, inputs, cotangents, setting.tiny), roundings, dtype),
        *(Contestant(peer, partial(_absent, peer), roundings, dtype) for peer in PEERS),
    ]
    yield from Contest(
        {"op": op, "shape": name, "sizes": list(shape), "dtype": str(dtype).removeprefix("torch.")},
        device,
        inputs,
        cotangents,
        expected,
        [float(torch.linalg.vector_norm(t)) for t in expected],
        {direction: units * unit for direction, units in moved.items()},
        tuple(contestants),
    ).rows(setting)


def compiled(plain: Plain, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], tiny: bool) -> Forward:
    """``plain`` through torch.compile, where a compiler works."""
    if tiny:
        raise AbsentError("left out of a tiny run: compiling takes longer than all the rest")
    torch.compiler.reset()
    run: Any = torch.compile(plain)
    try:
        torch.autograd.grad(run(*inputs), list(inputs), list(cotangents))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AbsentError(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}") from None
    return lambda: run(*inputs)


def _absent(peer: str) -> Forward:
    if importlib.util.find_spec(peer) is None:
        raise AbsentError(f"{peer} is not installed")
    raise AbsentError(f"{peer} has no kernel with modulation, and no gradient of scale and shift")
