"""Sequence parallelism: softmax states of the token shards of a group, merged to that of one device with all tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def merge_pools(sums: Tensor, lse: Tensor) -> Tensor:
    """State of the union of R disjoint sets of tokens: ``[R, B, H Q, C]`` and ``[R, B, H Q]`` to ``[B, H Q, C]``."""
    return (torch.softmax(lse, dim=0).unsqueeze(-1) * sums).sum(0)


def replicated(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``tensor``, which every rank has, as it meets the rank's own shard: its gradient is the sum over the ranks."""
    shared: Tensor = _SumOfGradients.apply(tensor, group)  # type: ignore[no-untyped-call]
    return shared


def merge_over(group: dist.ProcessGroup, sums: Tensor, lse: Tensor) -> Tensor:
    """Weighted sums ``[B, H Q, C]`` of all ranks' tokens from each rank's ``sums`` and ``lse`` ``[B, H Q]``.

    Raises:
        ValueError: a sample that has no tokens on any rank.
    """
    state = torch.cat([sums, lse.unsqueeze(-1)], dim=-1)
    states = _GatherStates.apply(state, group)  # type: ignore[no-untyped-call]
    sums, lse = states[..., :-1], states[..., -1]
    if bool((lse.amax(0) == -math.inf).any()):
        raise ValueError("lengths: expected at least one token per sample over the ranks of group")
    return merge_pools(sums, lse)


class _GatherStates(torch.autograd.Function):
    """All ranks' states, stacked. Every rank goes on to the same loss, which counts once: each keeps its own share."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        states = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
        dist.all_gather(states, state.contiguous(), group=group)
        return torch.stack(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _SumOfGradients(torch.autograd.Function):
    """A replicated tensor that meets a different shard on every rank: its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
