"""Attention in plain torch, forward and backward, a bounded slice of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prfl_fast.ops.attention.provider import Problem, Provider
from prfl_fast.ops.rows.reference import compute_dtype

# Scores that are held at once.
_SCORES = 2**24


class Reference(Provider):
    """Products in float32 (float64 for float64); deterministic."""

    name = "reference"

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        return None

    @property
    def takes_d_lse(self) -> bool:
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype, device=q.device)
        keys, values = k.to(dtype).permute(0, 2, 3, 1), v.to(dtype).transpose(1, 2)
        for rows in _slices(q, k):
            scores = torch.matmul(q[:, rows].to(dtype).transpose(1, 2), keys) * scale
            lse[..., rows] = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - lse[..., rows, None])
            out[:, rows] = torch.matmul(weights, values).transpose(1, 2).to(q.dtype)
        return out, lse

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
        dtype = compute_dtype(q)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in _slices(q, k):
            queries, d = (t[:, rows].to(dtype).transpose(1, 2) for t in (q, d_out))
            weights = torch.exp(torch.matmul(queries, keys.mT) * scale - lse[..., rows, None])
            delta = (d * out[:, rows].to(dtype).transpose(1, 2)).sum(-1, keepdim=True)
            if d_lse is not None:
                delta = delta - d_lse[..., rows, None].to(dtype)
            d_scores = weights * (torch.matmul(d, values.mT) - delta) * scale
            dq[:, rows] = torch.matmul(d_scores, keys).transpose(1, 2).to(q.dtype)
            dk += torch.matmul(d_scores.mT, queries)
            dv += torch.matmul(weights.mT, d)
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def _slices(q: Tensor, k: Tensor) -> Iterator[slice]:
    batch, queries, heads, _ = q.shape
    step = max(1, _SCORES // max(1, batch * heads * k.shape[1]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))
