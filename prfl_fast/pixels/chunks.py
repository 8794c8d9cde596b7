"""Decoding in checkpoints: a causal decoder chunk by chunk with what it carries along, any other call by call.

A causal video decoder takes a few latent frames at a time and carries the last features of every convolution to the
next chunk (its cache). diffusers keeps that cache in a list that each call writes to; here it is an argument and a
result, so a chunk that is computed again in the backward starts from the cache that it had, and the gradient flows
through the cache from each chunk to those before.

A cache is large (two frames of features for every convolution), so keeping one for each of n chunks would soon outweigh
the one graph that checkpointing leaves. Chunks are therefore grouped in segments of about sqrt(n), which are
checkpoints themselves (two levels of the scheme of arXiv 1604.06174): at most 2 sqrt(n) caches live at a time, for one
more forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

Step = Callable[[int, Tensor, Any], tuple[Tensor, Any]]


def decode_in_chunks(step: Step, chunks: Sequence[Tensor], carry: Any) -> Tensor:
    """Frames of all chunks in turn, joined along dimension 2.

    Args:
        step: ``(index, chunk, carry) -> (frames, carry)``, a pure function; ``carry`` is any nest of lists, tuples and
            dictionaries of tensors and constants, made anew for each call, which may put others in their places.
        chunks: inputs of the steps, at least one.
        carry: what the first step is given.
    """

    # Tensors go in and out as separate arguments: only so does a checkpoint know them, and a segment let go of them.
    def chunk_call(index: int, spec: Any, chunk: Tensor, *leaves: Any) -> tuple[Any, ...]:
        frames, after = step(index, chunk, tree_unflatten(list(leaves), spec))
        left, spec_after = tree_flatten(after)
        return frames, spec_after, *left

    def segment_call(first: int, count: int, spec: Any, *values: Any) -> tuple[Any, ...]:
        pieces, leaves = [], list(values[count:])
        for offset, chunk in enumerate(values[:count]):
            result: Any = checkpoint(chunk_call, first + offset, spec, chunk, *leaves, use_reentrant=False)
            piece, spec, *leaves = result
            pieces.append(piece)
        return torch.cat(pieces, 2), spec, *leaves

    leaves, spec = tree_flatten(carry)
    pieces, length = [], math.ceil(math.sqrt(len(chunks)))
    for first in range(0, len(chunks), length):
        segment = chunks[first : first + length]
        result: Any = checkpoint(segment_call, first, len(segment), spec, *segment, *leaves, use_reentrant=False)
        piece, spec, *leaves = result
        pieces.append(piece)
    return torch.cat(pieces, 2)


@contextmanager
def checkpointed_calls(decoder: nn.Module) -> Iterator[None]:
    """Inside, every call of ``decoder`` is one checkpoint; so code that calls it for tiles or groups of frames holds
    the graph of one call at a time. A cache in a list (``feat_cache``, ``feat_idx``), which the call writes to, is
    handed to each computation as it was."""
    had_own, own = "forward" in vars(decoder), decoder.forward

    def with_cache(x: Tensor, keywords: dict[str, Any], start: int, *cache: Any) -> tuple[Any, ...]:
        after, index = list(cache), [start]
        return own(x, feat_cache=after, feat_idx=index, **keywords), index[0], *after

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        cache, index = keywords.pop("feat_cache", None), keywords.pop("feat_idx", None)
        if cache is None:
            return checkpoint(own, x, *arguments, use_reentrant=False, **keywords)
        result: Any = checkpoint(with_cache, x, keywords, index[0], *cache, use_reentrant=False)
        frames, index[0], *cache[:] = result
        return frames

    decoder.forward = forward
    try:
        yield
    finally:
        if had_own:
            decoder.forward = own
        else:
            del decoder.forward
