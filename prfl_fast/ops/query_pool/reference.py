"""The pooling's formulas in plain torch, forward and backward: what the kernels are compared with.

Products are in the dtype of the folded query; tokens of a narrower one are converted a bounded slice at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a slice of tokens that is converted to the accumulation dtype at a time (32 MiB in float32).
_SLICE_ELEMENTS = 2**23


def forward(x: Tensor, folded: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums ``[B, H Q, C]``, log-sum-exp ``[B, H Q]`` and scores ``[B, H Q, L]``, minus infinity at padding."""
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
    return sums, lse, scores


def backward(
    x: Tensor,
    folded: Tensor,
    sums: Tensor,
    scores: Tensor,
    d_sums: Tensor,
    d_lse: Tensor | None,
    lengths: Sequence[int] | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, ``[B, L, C]`` and contiguous, and of the folded query, None where not ``needed``."""
    plain = torch.contiguous_format
    grad_x = None
    if needed[0]:
        # Padding gets zeros; without any, every element is written below.
        make = torch.empty_like if lengths is None else torch.zeros_like
        grad_x = make(x, memory_format=plain)
    grad_folded = torch.zeros_like(folded, memory_format=plain) if needed[1] else None
    with torch.autocast(x.device.type, enabled=False):
        for samples, count in _slabs(x.shape[0], x.shape[1], lengths):
            outer = d_sums[samples]
            shift = -(outer * sums[samples]).sum(-1, keepdim=True)
            if d_lse is not None:
                shift = shift + d_lse[samples, :, None]
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
    return grad_x, grad_folded


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
