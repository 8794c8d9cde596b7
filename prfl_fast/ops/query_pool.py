"""Multi-head attention of a few learned queries over many tokens, without the keys and values of the tokens.

With Q queries and L tokens, Q far below L, the products that make K and V cost nearly everything and hold two tensors
of the size of the tokens. Both are linear, so they move to the other side of the softmax:

    scores[b, h, q, l] = q_h . (Wk_h x[b, l] + bk_h) / sqrt(d) = x[b, l] . (Wk_h^T q_h) / sqrt(d) + (a constant over l)
    sum_l p[l] (Wv_h x[b, l] + bv_h) = Wv_h (sum_l p[l] x[b, l]) + bv_h

(The constant cancels in the softmax, so the key bias has no influence: its gradient is exactly zero.) What is left is
one pass over the raw tokens, whose partial states merge exactly (Milakov and Gimelshein 2018, arXiv 1805.02867): that
is how token shards on several ranks become one result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Elements of a slice of tokens that is converted to the accumulation dtype at a time (32 MiB in float32).
_SLICE_ELEMENTS = 2**23


def fold_query(
    queries: Tensor, in_proj_weight: Tensor, in_proj_bias: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor:
    """Queries folded into the key projection, ``[H Q, C]`` in ``dtype``: ``Wk_h^T (Wq_h q + bq_h) / sqrt(d)``."""
    dim = queries.shape[1]
    head_dim = dim // num_heads
    bias = None if in_proj_bias is None else in_proj_bias[:dim].to(dtype)
    q = linear(queries.to(dtype), in_proj_weight[:dim].to(dtype), bias) / math.sqrt(head_dim)
    q = q.unflatten(1, (num_heads, head_dim)).transpose(0, 1)
    keys = in_proj_weight[dim : 2 * dim].to(dtype).unflatten(0, (num_heads, head_dim))
    return torch.bmm(q, keys).flatten(0, 1)


def partial_pool(x: Tensor, folded: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Softmax state of a set of tokens: weighted sums of the raw tokens and log-sum-exp of the scores.

    Args:
        x: ``[B, L, C]`` tokens, any float dtype and strides.
        folded: ``[H Q, C]`` from :func:`fold_query`; its dtype is that of the state.
        lengths: tokens that count per sample, from the front; the others are never read. A sample without any has
            sums of zero and a log-sum-exp of minus infinity.

    Returns:
        ``[B, H Q, C]`` and ``[B, H Q]``. Differentiable once, in both.
    """
    sums, lse = _PartialPool.apply(x, folded, lengths)  # type: ignore[no-untyped-call]
    return sums, lse


def merge_pools(sums: Tensor, lse: Tensor) -> Tensor:
    """State of the union of R disjoint sets of tokens: ``[R, B, H Q, C]`` and ``[R, B, H Q]`` to ``[B, H Q, C]``."""
    return (torch.softmax(lse, dim=0).unsqueeze(-1) * sums).sum(0)


class _PartialPool(torch.autograd.Function):
    """Keeps the tokens (which the caller holds anyway), the scores ``[B, H Q, L]`` and the small results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        batch, tokens, dim = x.shape
        rows = folded.shape[0]
        scores = folded.new_full((batch, rows, tokens), -math.inf)
        sums = folded.new_zeros(batch, rows, dim)
        lse = folded.new_full((batch, rows), -math.inf)
        with torch.autocast(x.device.type, enabled=False):
            for samples, count in _slabs(batch, tokens, lengths):
                left = folded.expand(samples.stop - samples.start, rows, dim)
                top, total, mean = lse[samples, :, None], sums[samples, :, :1], sums[samples]
                for start, stop, part in _slices(x[samples, :count], folded.dtype):
                    part_scores = torch.bmm(left, part.mT)
                    scores[samples, :, start:stop] = part_scores
                    new_top = torch.maximum(top, part_scores.amax(-1, keepdim=True))
                    weights, rescale = torch.exp(part_scores - new_top), torch.exp(top - new_top)
                    total = total * rescale + weights.sum(-1, keepdim=True)
                    mean = mean * rescale + torch.bmm(weights, part)
                    top = new_top
                sums[samples] = mean / total
                lse[samples] = (top + torch.log(total)).squeeze(-1)
        ctx.lengths = lengths
        ctx.save_for_backward(x, folded, scores, sums)
        return sums, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, folded, scores, sums = ctx.saved_tensors
        need_x, need_folded = ctx.needs_input_grad[:2]
        # Padding gets zeros; without any, every element is written below.
        grad_x = None if not need_x else torch.empty_like(x) if ctx.lengths is None else torch.zeros_like(x)
        grad_folded = torch.zeros_like(folded) if need_folded else None
        with torch.autocast(x.device.type, enabled=False):
            for samples, count in _slabs(x.shape[0], x.shape[1], ctx.lengths):
                outer = grad_sums[samples]
                shift = grad_lse[samples, :, None] - (outer * sums[samples]).sum(-1, keepdim=True)
                weights = torch.softmax(scores[samples, :, :count], dim=-1)
                # dx = p^T g + ds^T f as one product, so that the gradient of the tokens is written once.
                right = torch.cat([outer, folded.expand(outer.shape)], dim=1)
                for start, stop, part in _slices(x[samples, :count], folded.dtype):
                    p = weights[..., start:stop]
                    grad_scores = p * (torch.bmm(outer, part.mT) + shift)
                    if grad_folded is not None:
                        grad_folded += torch.bmm(grad_scores, part).sum(0)
                    if grad_x is not None:
                        target, left = grad_x[samples, start:stop], torch.cat([p, grad_scores], dim=1).mT
                        if target.dtype == right.dtype:
                            target.baddbmm_(left, right, beta=0)
                        else:
                            target.copy_(torch.bmm(left, right))
        return grad_x, grad_folded, None


def _slabs(batch: int, tokens: int, lengths: Sequence[int] | None) -> Iterator[tuple[slice, int]]:
    """Samples that are worked on together, with their number of tokens."""
    if lengths is None:
        if batch and tokens:
            yield slice(0, batch), tokens
        return
    for index, count in enumerate(lengths):
        if count:
            yield slice(index, index + 1), count


def _slices(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Tokens in ``dtype``: all at once where they have it, else converted one bounded slice after the other."""
    batch, tokens, dim = x.shape
    if x.dtype == dtype:
        yield 0, tokens, x
        return
    step = max(1, _SLICE_ELEMENTS // (batch * dim))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        yield start, stop, x[:, start:stop].to(dtype)


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


def _check(
    x: Tensor,
    queries: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    sharded: bool,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x: expected tokens [B, L, C], got shape {tuple(x.shape)}")
    dim = x.shape[2]
    if not x.shape[1] and not sharded:
        raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
    if queries.ndim != 2 or queries.shape[1] != dim or not queries.shape[0]:
        raise ValueError(f"queries: expected [Q, {dim}] with Q >= 1, got {tuple(queries.shape)}")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {dim} channels, got {num_heads}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("in_proj_weight", in_proj_weight, (3 * dim, dim)),
        ("in_proj_bias", in_proj_bias, (3 * dim,)),
        ("out_proj_weight", out_proj_weight, (dim, dim)),
        ("out_proj_bias", out_proj_bias, (dim,)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor, _ in [("x", x, ()), ("queries", queries, ()), *expected]:
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
        if name != "x" and tensor.dtype != queries.dtype:
            raise TypeError(f"{name}: expected the dtype of queries, {queries.dtype}, got {tensor.dtype}")


def _read_lengths(lengths: Tensor | Sequence[int], x: Tensor, sharded: bool) -> list[int]:
    if isinstance(lengths, Tensor) and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    least = 0 if sharded else 1
    if not isinstance(values, list) or len(values) != x.shape[0]:
        raise ValueError(f"lengths: expected one per sample ({x.shape[0]}), got {values}")
    if not all(isinstance(value, int) and least <= value <= x.shape[1] for value in values):
        raise ValueError(f"lengths: expected integers in {least}..{x.shape[1]}, got {values}")
    return values


def query_pool(
    x: Tensor,
    queries: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``torch.nn.MultiheadAttention`` (no dropout) of ``queries`` over the tokens, with no K and no V of the tokens.

    Parameters as in that module: rows 0..C of the input projection make the query, C..2C the key, 2C..3C the value.
    Computes in the wider of the dtypes of ``x`` and the parameters, in float32 at least (autocast does not reach
    inside); tokens of a narrower dtype are converted a bounded slice at a time. Kept for the backward: ``x`` itself
    and the scores ``[B, H Q, L]``. Differentiable once: the softmax refuses a second derivative with an error.

    Args:
        x: ``[B, L, C]`` tokens, any float dtype, any strides.
        queries: ``[Q, C]``, in the dtype of the other parameters.
        in_proj_weight: ``[3 C, C]``.
        in_proj_bias: ``[3 C]`` or None.
        out_proj_weight: ``[C, C]``.
        out_proj_bias: ``[C]`` or None.
        num_heads: a divisor of C.
        lengths: ``[B]`` integers: tokens that count per sample, from the front. The padding behind them is never read
            (it may hold NaN) and gets gradients of zero. A sample without tokens has no mean: an error. Read on the
            host: give them as a CPU tensor or a list to avoid a synchronisation.
        group: sequence parallelism: ``x`` is this rank's shard of the tokens (lengths may differ from rank to rank,
            zero too, and ``lengths`` counts in the shard), everything else is the same on every rank of the group.
            Every rank returns the same result and must go on to the same loss. The gradients are those of one device
            holding all tokens: of ``x``, the shard's part; of the parameters, the whole on every rank (averaged over
            ranks, as data parallelism does, they stay what they are).

    Returns:
        ``[B, Q, C]`` in the dtype of the parameters.

    Raises:
        ValueError: wrong shapes, devices, heads or lengths; no tokens.
        TypeError: wrong dtypes.
    """
    sharded = group is not None
    _check(x, queries, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads, sharded)
    counts = None if lengths is None else _read_lengths(lengths, x, sharded)
    dim, count = x.shape[2], queries.shape[0]
    head_dim = dim // num_heads
    dtype = torch.promote_types(torch.promote_types(x.dtype, queries.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        folded = fold_query(queries, in_proj_weight, in_proj_bias, num_heads, dtype)
        if group is None:
            sums, _ = partial_pool(x, folded, counts)
        else:
            folded = _SumOfGradients.apply(folded, group)  # type: ignore[no-untyped-call]
            sums, lse = partial_pool(x, folded, counts)
            state = torch.cat([sums, lse.unsqueeze(-1)], dim=-1)
            states = _GatherStates.apply(state, group)  # type: ignore[no-untyped-call]
            sums, lse = states[..., :-1], states[..., -1]
            if bool((lse.amax(0) == -math.inf).any()):
                raise ValueError("lengths: expected at least one token per sample over the ranks of group")
            sums = merge_pools(sums, lse)
        sums = sums.unflatten(1, (num_heads, count))
        values = in_proj_weight[2 * dim :].to(dtype).unflatten(0, (num_heads, head_dim))
        heads = torch.einsum("bhqc,hdc->bqhd", sums, values).flatten(2)
        if in_proj_bias is not None:
            heads = heads + in_proj_bias[2 * dim :].to(dtype)
        bias = None if out_proj_bias is None else out_proj_bias.to(dtype)
        return linear(heads, out_proj_weight.to(dtype), bias).to(queries.dtype)
