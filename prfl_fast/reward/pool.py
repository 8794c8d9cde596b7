"""Learned queries that pool a token stream, and the perceptron that reads a score from what they found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from prfl_fast.ops import query_pool


class QueryAttentionPool(nn.Module):
    """``pool(x) = MultiheadAttention(queries, x, x) + queries``, folded so that no key and no value of x is made.

    The ``state_dict`` is that of PRFL's published ``QueryAttention``: ``queries [Q, D]`` and ``multihead_attn.`` with
    ``in_proj_weight``, ``in_proj_bias``, ``out_proj.weight``, ``out_proj.bias``. For one sample the result is the
    published one; for more it is every sample's own (the published code mixes the batch axis into the queries').

    Args:
        dim: D, width of the tokens.
        num_queries: Q.
        num_heads: a divisor of D.

    Raises ValueError when a number is below 1 or the heads do not divide D.
    """

    def __init__(self, dim: int, num_queries: int = 1, num_heads: int = 8) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_queries", num_queries), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim {dim}, got {num_heads}")
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.normal_(self.queries, std=0.02)
        # Holds the parameters, under their published names and with their usual initialisation; never called.
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """``[B, L, D]`` tokens of any float dtype to ``[B, Q, D]`` in the parameters' dtype.

        ``lengths`` ``[B]``: tokens that count per sample, see :func:`prfl_fast.ops.query_pool`, which also tells the
        errors.
        """
        attention = self.multihead_attn
        pooled = query_pool(
            x,
            self.queries,
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj.weight,
            attention.out_proj.bias,
            attention.num_heads,
            lengths=lengths,
        )
        return pooled + self.queries

    def extra_repr(self) -> str:
        return f"dim={self.queries.shape[1]}, num_queries={self.queries.shape[0]}"


class RewardHead(nn.Module):
    """``[..., D]`` to ``[...]``: D, 1024, 512, 1 with ReLU between, under PRFL's published names fc1, fc2, fc3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 1024)
        self.fc2 = nn.Linear(1024, 512)
        self.fc3 = nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.fc2(functional.relu(self.fc1(x))))
        logits: Tensor = self.fc3(hidden)
        return logits.squeeze(-1)
