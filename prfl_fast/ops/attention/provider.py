"""What an attention kernel has to offer to be dispatched to, and the problem that it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Shape and conditions of one attention, ``[B, L, H, D]``: all that a choice between kernels may depend on."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    deterministic: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, deterministic: bool) -> Problem:
        """The problem of these queries and keys."""
        batch, queries, heads, head_dim = q.shape
        return cls(q.device, q.dtype, batch, queries, k.shape[1], heads, head_dim, deterministic)


class Provider(ABC):
    """One family of kernels. Every backward takes every forward's output and log-sum-exp: natural logarithm,
    ``[B, H, L]``, float32 (float64 for float64), no padding. Scale is that of the scores.

    Attributes:
        name: under which it is chosen, overridden and reported.
    """

    name: str

    @abstractmethod
    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        """Why it can't run the problem, in a few words; None where it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output ``[B, Lq, H, D]`` and log-sum-exp."""

    @abstractmethod
    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        d_lse: Tensor | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their dtypes. ``d_lse`` is None for those without ``takes_d_lse``."""

    @property
    def takes_d_lse(self) -> bool:
        """True where the backward adds a gradient that reaches the log-sum-exp."""
        return False

    def version(self) -> str:
        """What its kernels come from, for reports."""
        return f"torch {torch.__version__}"
