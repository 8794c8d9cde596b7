"""What an attention kernel has to offer to be dispatched to, and the problem that it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# Which of the gradients of q, k and v are wanted.
Needed = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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

    @property
    def empty(self) -> bool:
        """True where there is nothing to compute."""
        return not (self.batch and self.queries and self.keys and self.heads)


class Provider(ABC):
    """One family of kernels. Every backward takes every forward's output and log-sum-exp: natural logarithm,
    ``[B, H, L]``, float32 (float64 for float64), no padding. Scale is that of the scores.

    Attributes:
        name: under which it is chosen, overridden and reported.
    """

    name: str

    def missing(self) -> str | None:
        """Why it is not there, whatever the problem; None where it is installed."""
        return None

    @abstractmethod
    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        """Why it can't run the problem, in a few words; None where it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output ``[B, Lq, H, D]`` and log-sum-exp, in any strides."""

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

    def some_gradients(
        self,
        needed: Needed,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        d_lse: Tensor | None,
        deterministic: bool,
    ) -> Gradients:
        """The needed gradients, None for others. For kernels that give all at once: what is not needed is dropped."""
        dq, dk, dv = self.backward(d_out, q, k, v, out, lse, scale, d_lse, deterministic)
        return dq if needed[0] else None, dk if needed[1] else None, dv if needed[2] else None

    @property
    def takes_d_lse(self) -> bool:
        """True where the backward adds a gradient that reaches the log-sum-exp."""
        return False

    def version(self) -> str:
        """What its kernels come from, for reports."""
        return f"torch {torch.__version__}"
