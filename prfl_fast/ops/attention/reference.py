"""Attention in plain torch, forward and backward, a bounded slice of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prfl_fast.ops.attention.provider import Gradients, Needed, Problem, Provider
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
        # Autocast would round what is computed in float32 on purpose.
        with torch.autocast(q.device.type, enabled=False):
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
        everything = (True, True, True)
        dq, dk, dv = self.some_gradients(everything, d_out, q, k, v, out, lse, scale, d_lse, deterministic)
        assert dq is not None and dk is not None and dv is not None
        return dq, dk, dv

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
        dtype = compute_dtype(q)
        keys, values = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needed[0] else None
        dk = torch.zeros_like(keys) if needed[1] else None
        dv = torch.zeros_like(values) if needed[2] else None
        with torch.autocast(q.device.type, enabled=False):
            for rows in _slices(q, k):
                queries, d = (t[:, rows].to(dtype).transpose(1, 2) for t in (q, d_out))
                weights = torch.exp(torch.matmul(queries, keys.mT) * scale - lse[..., rows, None])
                if dv is not None:
                    dv += torch.matmul(weights.mT, d)
                if dq is None and dk is None:
                    continue
                delta = (d * out[:, rows].to(dtype).transpose(1, 2)).sum(-1, keepdim=True)
                if d_lse is not None:
                    delta = delta - d_lse[..., rows, None].to(dtype)
                d_scores = weights * (torch.matmul(d, values.mT) - delta) * scale
                if dq is not None:
                    dq[:, rows] = torch.matmul(d_scores, keys).transpose(1, 2).to(q.dtype)
                if dk is not None:
                    dk += torch.matmul(d_scores.mT, queries)
        return dq, _tokens_first(dk, k), _tokens_first(dv, v)


def _tokens_first(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.transpose(1, 2).to(like.dtype)


def _slices(q: Tensor, k: Tensor) -> Iterator[slice]:
    batch, queries, heads, _ = q.shape
    step = max(1, _SCORES // max(1, batch * heads * k.shape[1]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))
