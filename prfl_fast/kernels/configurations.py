"""The launches that production models make: what `prfl-fast compile` builds ahead of time.

A kernel module lists its own in a function ``production(architecture)`` and stands in ``MODULES``. A launch is the
module's own launcher called with tensors that have a shape and no memory (device ``meta``), so that what is compiled is
what a GPU would be asked to run: constants, dtypes, strides and their divisibility by 16, warps and stages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODULES = ("row_launch", "qk_norm_rope", "attention", "query_pool_launch", "solver_step")


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    Attributes:
        op: the public op that makes it.
        name: model, shape and direction, the same for every architecture.
        run: makes the call; it may launch several kernels.
    """

    op: str
    name: str
    run: Callable[[], object]


def production(architecture: int) -> list[Launch]:
    """All launches of all modules for compute capability 80, 90 or 100 (major and minor in one number)."""
    found = []
    for name in MODULES:
        found += importlib.import_module(f"prfl_fast.kernels.{name}").production(architecture)
    return found


def shape_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def chunk_of(parts: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One of ``parts`` chunks ``[B, R, C]`` as AdaLN hands them out: rows are ``parts`` rows apart."""
    batch, rows, channels = shape
    return shape_of(batch, rows, parts, channels, dtype=dtype)[:, :, 0]
