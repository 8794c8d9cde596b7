"""Attention of a fused block: which modules it may replace, and whose kernels run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from prfl_fast.models.fused.linears import hooked, linears
from prfl_fast.models.fused.values import Value, class_path, is_norm, norm_of
from prfl_fast.ops import attention, qk_norm_rope

_remembered: Any = WeakTensorKeyDictionary()


def why_unfused(attn: Any, processors: Collection[str]) -> str | None:
    """Why the attention module ``attn`` is called as it is; None where its projections, norms and kernel are fused.

    ``processors``: class paths of diffusers' own processors, whose arithmetic a family file writes down.
    """
    processor = class_path(type(attn.processor))
    if processor not in processors:
        return f"its processor is {type(attn.processor).__name__}"
    if hooked(attn):
        return "it has hooks of its own"
    names = ("norm_q", "norm_k", *(name for name in ("norm_added_q", "norm_added_k") if hasattr(attn, name)))
    for name in names:
        norm = getattr(attn, name)
        if norm is None and "added" in name:
            continue
        if norm is None or not is_norm(norm) or hooked(norm):
            return f"its {name} is {type(norm).__name__}" + (" with hooks" if norm is not None and hooked(norm) else "")
    return None


def splits(attn: Any) -> bool:
    """True where diffusers splits the sequence over devices: queries and keys then have to come as it cut them."""
    return getattr(attn.processor, "_parallel_config", None) is not None


def heads(attn: Any, tensor: Tensor) -> Tensor:
    """``[B, L, H D]`` as ``[B, L, H, D]``."""
    split: Tensor = tensor.unflatten(2, (attn.heads, -1))
    return split


def projections(
    attn: Any, own: Value, other: Value | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of ``own``, keys and values of ``other`` (None: of ``own``), ``[B, L, H, D]``.

    ``fused``: the processor reads the one projection that ``fuse_projections`` made.
    """
    if other is None and fused:
        q, k, v = linears(own, attn.to_qkv)[0].chunk(3, dim=-1)
        v = v.contiguous()  # else the whole product would be kept for its values
    elif other is None:
        q, k, v = linears(own, attn.to_q, attn.to_k, attn.to_v)
    else:
        (q,) = linears(own, attn.to_q)
        if fused:
            k, v = linears(other, attn.to_kv)[0].chunk(2, dim=-1)
        else:
            k, v = linears(other, attn.to_k, attn.to_v)
    return heads(attn, q), heads(attn, k), heads(attn, v)


def norm_rope(
    attn: Any,
    q: Tensor,
    k: Tensor,
    angles: tuple[Tensor, Tensor] | None = None,
    *,
    across_heads: bool,
    rope_tokens: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`prfl_fast.ops.qk_norm_rope` with the attention's own norms; ``angles``: cosines and sines."""
    q_norm, k_norm = norm_of(attn.norm_q), norm_of(attn.norm_k)
    cos, sin = angles or (None, None)
    return qk_norm_rope(
        q, k, q_norm.weight, k_norm.weight, q_norm.bias, k_norm.bias, cos, sin, eps=q_norm.eps, kind=q_norm.kind,
        across_heads=across_heads, rope_tokens=rope_tokens,
    )  # fmt: skip


def attend(
    processor: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    kv_lengths: Sequence[int] | None = None,
    parallel: bool = True,
) -> Tensor:
    """Attention of ``[B, L, H, D]`` as ``[B, Lq, H D]``.

    By :func:`prfl_fast.ops.attention`; by diffusers' dispatch where the user gave the processor a backend
    (``set_attention_backend``), where the sequence is split over devices (``enable_parallelism``), and for a mask that
    is no length per sample.

    Args:
        processor: the attention's.
        q: queries.
        k: keys.
        v: values.
        mask: as diffusers builds it, where ``kv_lengths`` can't say it.
        kv_lengths: keys that count per sample.
        parallel: False for a cross-attention whose keys every device has whole.
    """
    backend = getattr(processor, "_attention_backend", None)
    config = getattr(processor, "_parallel_config", None) if parallel else None
    # No keys at all: what comes of that is diffusers' own.
    if backend is None and config is None and mask is None and k.shape[1]:
        return attention(q, k, v, kv_lengths=kv_lengths).flatten(2)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if mask is None and kv_lengths is not None:
        keys = torch.arange(k.shape[1], device=k.device)
        mask = keys < torch.tensor(kv_lengths, device=k.device).reshape(-1, 1, 1, 1)
    out: Tensor = dispatch_attention_fn(
        q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=backend, parallel_config=config
    )
    return out.flatten(2).to(q.dtype)


def remember(key: Tensor, name: str, make: Callable[[], Any]) -> Any:
    """``make()``, once for as long as ``key`` lives: what all blocks of a call derive from one tensor of it.

    A checkpoint hands its inputs to the recomputation as the same tensors, so that finds it too.
    """
    if torch.compiler.is_compiling():
        return make()
    known = _remembered.setdefault(key, {})
    version = -1 if key.is_inference() else key._version
    if name not in known or known[name][0] != version:
        known[name] = (version, make())
    return known[name][1]


def pairs(tables: tuple[Tensor, Tensor] | None, shape: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines with one value per rotated pair, from tables in which each stands twice, side by side.

    ``shape`` brings a table of half the width to ``[B or 1, L, H or 1, pairs]``.
    """
    if tables is None:
        return None
    cos, sin = tables
    return (
        remember(cos, "cos", lambda: shape(cos[..., 0::2]).contiguous()),
        remember(sin, "sin", lambda: shape(sin[..., 1::2]).contiguous()),
    )


def valid_lengths(mask: Tensor | None, valid: Callable[[Tensor], Tensor | None]) -> tuple[list[int] | None, bool]:
    """The keys that count per sample, from the front, where that says all that a mask says.

    Args:
        mask: as diffusers hands it to a block, or None.
        valid: makes it ``[B, keys]``, true where a key counts, or None where it says more than that.

    Returns:
        Lengths (None: all keys), and whether the mask is needed after all: holes, or no value to read (a compiler, a
        fake tensor). Read on the host, once a call.
    """
    if mask is None:
        return None, False
    if torch.compiler.is_compiling() or isinstance(mask, FakeTensor):
        return None, True
    lengths: list[int] | None = remember(mask, "lengths", lambda: _read(valid(mask)))
    if lengths is None:
        return None, True
    return (None if all(length < 0 for length in lengths) else lengths), False


def _read(valid: Tensor | None) -> list[int] | None:
    if valid is None:
        return None
    counts = valid.sum(1)
    front = torch.arange(valid.shape[1], device=valid.device) < counts.unsqueeze(1)
    *lengths, exact = torch.cat([counts, (front == valid).all().reshape(1).to(counts.dtype)]).tolist()
    if not exact or min(lengths) < 1:
        return None
    # -1: nothing is cut off, and no one has to be told.
    return [-1] * len(lengths) if min(lengths) == valid.shape[1] else lengths
